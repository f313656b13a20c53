"""The shipped workflows as files: valid, closed, installable by the Manager, and in step.

The files are the source: nothing writes them but the frontend. What only a running ComfyUI can
tell (they are served, they run, the frontend opens and queues them) is in `tests/server` and
`tests/browser`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "example_workflows"
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


DOCUMENTS = {path.stem: read(path) for path in sorted(FOLDER.glob("*.json"))}
PROMPTS = {path.stem: read(path) for path in (FOLDER / "api").glob("*.json")}
DEFINITIONS = read(ROOT / "tests" / "goldens" / "object_info.json")
PROMISED = read(ROOT / "tests" / "goldens" / "node_inputs.json")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DIRECTORIES = {
    "CheckpointLoaderSimple": "checkpoints",
    "ControlNetLoader": "controlnet",
    "UNETLoader": "diffusion_models",
    "CLIPLoader": "text_encoders",
    "VAELoader": "vae",
}
NOTE = "MarkdownNote"  # the one node that the server does not know
TYPES = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool, "COMBO": str}


# What the frontend makes of a file, and the server of that; written from the format 0.4.


def specs(definition: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the inputs of a node in the order in which ComfyUI declares them."""
    parts, order = definition["input"], definition["input_order"]
    return {key: parts[part][key] for part in parts for key in order[part]}


def kind_of(spec: list[Any]) -> str:
    """Return the type of an input; ComfyUI has two ways to write COMBO."""
    return "COMBO" if isinstance(spec[0], list) else spec[0]


def widgets(definition: dict[str, Any]) -> list[str]:
    """Return what `widgets_values` holds; behind a seed stands its control, which has no name."""
    names = []
    for name, spec in specs(definition).items():
        if kind_of(spec) in TYPES:
            names += [name, ""] if spec[1].get("control_after_generate") else [name]
    return names


def prompt_of(document: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the prompt that the frontend queues for a workflow, which is its API copy.

    Inputs are appended, so a file from before has fewer values; the frontend takes defaults.
    """
    origins = {link[0]: [str(link[1]), link[2]] for link in document["links"]}
    prompt = {}
    for node in document["nodes"]:
        if node["type"] == NOTE:
            continue
        definition = definitions[node["type"]]
        names, values = widgets(definition), node.get("widgets_values", [])
        assert len(values) <= len(names), f"{node['type']} holds more values than it has widgets"
        inputs = dict(zip(names, values, strict=False))
        assert inputs.pop("", "fixed") == "fixed", f"the seed of {node['type']} would change"
        linked = {entry["name"]: entry["link"] for entry in node["inputs"]}
        inputs |= {name: origins[link] for name, link in linked.items() if link is not None}
        title = node.get("title") or definition["display_name"] or node["type"]
        prompt[str(node["id"])] = {
            "inputs": inputs,
            "class_type": node["type"],
            "_meta": {"title": title},
        }
    return prompt


def faults(prompt: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    """Yield what the server would refuse."""
    outputs = {key: definitions[node["class_type"]]["output"] for key, node in prompt.items()}
    for node in prompt.values():
        kind, inputs = node["class_type"], node["inputs"]
        declared = specs(definitions[kind])
        for name in definitions[kind]["input"].get("required", {}):
            if name not in inputs:
                yield f"{kind} has nothing for {name}"
        for name, value in inputs.items():
            if name not in declared:
                yield f"{kind} has no input {name}"
            elif not is_allowed(declared[name], value, outputs):
                yield f"{kind} does not allow {value!r} for {name}"


def is_allowed(spec: list[Any], value: Any, outputs: dict[str, list[str]]) -> bool:
    """Tell whether an input takes a value, or what comes over a link: a node and its output."""
    kind, options = kind_of(spec), spec[1]
    if isinstance(value, list):
        return kind in (outputs[value[0]][value[1]], "*")
    if not isinstance(value, TYPES[kind]) or isinstance(value, bool) != (kind == "BOOLEAN"):
        return False
    choices = spec[0] if isinstance(spec[0], list) else options.get("options")
    is_chosen = not choices or value in choices
    return is_chosen and options.get("min", value) <= value <= options.get("max", value)


# The workflows.


@pytest.fixture(params=DOCUMENTS)
def name(request) -> str:
    return request.param


@pytest.fixture
def document(name) -> dict[str, Any]:
    return DOCUMENTS[name]


def test_each_workflow_has_an_api_copy_a_name_for_a_url_and_a_thumbnail():
    assert DOCUMENTS
    assert set(DOCUMENTS) == set(PROMPTS)
    assert len({document["id"] for document in DOCUMENTS.values()}) == len(DOCUMENTS)
    for name in DOCUMENTS:
        assert re.fullmatch(r"SEG [A-Za-z0-9 -]+", name)
        thumbnail = FOLDER / f"{name}.jpg"
        assert thumbnail.stat().st_size < 300 * 1024
        with Image.open(thumbnail) as picture:
            assert picture.format == "JPEG"
            assert min(picture.size) >= 400


def test_a_workflow_opens_whole_and_its_api_copy_is_the_same_graph(name, document):
    assert document["version"] == 0.4
    assert PROMPTS[name] == prompt_of(document, DEFINITIONS)
    assert list(faults(PROMPTS[name], DEFINITIONS)) == []
    assert {node["type"] for node in document["nodes"]} & set(PROMISED)
    assert all(node["mode"] == 0 for node in document["nodes"])
    assert not [node for node in document["nodes"] if node["type"].startswith("LoadImage")]


def test_definitions_of_our_nodes_are_the_promised_ones():
    for kind, promised in PROMISED.items():
        assert {key: DEFINITIONS[kind][key] for key in promised} == promised


def test_every_node_names_its_pack_and_loaders_where_their_models_come_from(document):
    for node in document["nodes"]:
        properties, ours = node["properties"], node["type"] in PROMISED
        assert properties["Node name for S&R"] == node["type"]
        assert properties["cnr_id"] == (PROJECT["name"] if ours else "comfy-core")
        release, newest = properties["ver"], PROJECT["version"] if ours else "0.30.0"
        assert [*map(int, release.split("."))] <= [*map(int, newest.split("."))]
        if "Loader" not in node["type"]:
            continue
        (model,) = properties["models"]
        assert set(model) == {"name", "url", "directory"}
        assert model["name"] == node["widgets_values"][0]
        assert re.match(r"https://huggingface\.co/[^/]+/[^/]+/resolve/", model["url"])
        assert model["url"].endswith(f"/{model['name']}")
        assert model["name"].endswith((".safetensors", ".sft", ".ckpt", ".pth", ".pt"))
        assert model["directory"] == DIRECTORIES[node["type"]]


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if "without a prompt" in name])
def test_without_a_prompt_means_cfg_1_and_an_empty_text(name):
    nodes = PROMPTS[name].values()
    assert [node["inputs"]["cfg"] for node in nodes if node["class_type"] == "KSampler"][-1] == 1
    texts = [node["inputs"]["text"] for node in nodes if node["class_type"] == "CLIPTextEncode"]
    assert "" in texts


# Blueprints; `tests/browser` runs them.


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_a_blueprint_is_one_described_subgraph_of_valid_nodes(path):
    document = read(path)
    (graph,) = document["definitions"]["subgraphs"]
    assert [node["type"] for node in document["nodes"]] == [graph["id"]]
    assert graph["name"] == path.stem
    assert graph["description"]
    assert {node["type"] for node in graph["nodes"]} & set(PROMISED)
    for node in graph["nodes"]:
        ours = node["type"] in PROMISED
        assert node["properties"]["cnr_id"] == (PROJECT["name"] if ours else "comfy-core")
