"""The shipped workflows as files: valid, closed, installable by the Manager, and in step.

The files are the source: nothing writes them but the frontend. What only a running ComfyUI can
tell (they are served, they run, the frontend opens and queues them) is in `tests/server` and
`tests/browser`.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from workflow_faults import faults, prompt_of

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


def with_input(part: str, position: int | None = None) -> dict[str, Any]:
    """Return the definitions as if each of our nodes had one input more."""
    definitions = copy.deepcopy(DEFINITIONS)
    for kind in PROMISED:
        definitions[kind]["input"].setdefault(part, {})["later"] = ["FLOAT", {"min": 0, "max": 1}]
        order = definitions[kind]["input_order"].setdefault(part, [])
        order.insert(len(order) if position is None else position, "later")
    return definitions


def test_saved_workflows_stay_valid_when_an_optional_input_is_appended(name, document):
    later = with_input("optional")
    assert prompt_of(document, later) == PROMPTS[name]
    assert list(faults(PROMPTS[name], later)) == []


@pytest.mark.parametrize(("part", "position"), [("optional", 0), ("required", None)])
def test_an_input_that_is_inserted_or_required_is_noticed(part, position):
    later = with_input(part, position)
    prompts = [prompt_of(document, later) for document in DOCUMENTS.values()]
    assert any(fault for prompt in prompts for fault in faults(prompt, later))


@pytest.mark.parametrize(
    ("kind", "name", "value", "words"),
    [
        ("SEGuidance", "branch", "sharp", "allow 'sharp' for branch"),
        ("SEGuidance", "infinite_blur", 1, "allow 1 for infinite_blur"),
        ("KSampler", "cfg", -1, "allow -1 for cfg"),
        ("KSampler", "blur", 1.0, "no input blur"),
        ("KSampler", "seed", None, "nothing for seed"),
        ("CLIPTextEncode", "clip", None, "nothing for clip"),
        ("VAEDecode", "vae", ["2", 0], "allow ['2', 0] for vae"),
    ],
)
def test_a_planted_fault_is_found(kind, name, value, words):
    prompt = copy.deepcopy(PROMPTS["SEG SDXL - text to image"])
    inputs = next(node["inputs"] for node in prompt.values() if node["class_type"] == kind)
    inputs[name] = value
    if value is None:
        del inputs[name]
    (fault,) = faults(prompt, DEFINITIONS)
    assert words in fault


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


# Blueprints and the app.


def inside(graph: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a subgraph as a prompt, with a node for what is outside of it, and definitions."""
    links = [[link["id"], link["origin_id"], link["origin_slot"]] for link in graph["links"]]
    prompt = prompt_of({"nodes": graph["nodes"], "links": links}, DEFINITIONS)
    outputs = [entry["type"] for entry in graph["inputs"]]
    outside = {"input": {}, "input_order": {}, "output": outputs}
    prompt["-10"] = {"class_type": "outside", "inputs": {}}
    return prompt, {**DEFINITIONS, "outside": outside}


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_a_blueprint_is_one_described_subgraph_of_valid_nodes(path):
    document = read(path)
    (graph,) = document["definitions"]["subgraphs"]
    assert [node["type"] for node in document["nodes"]] == [graph["id"]]
    assert graph["name"] == path.stem
    assert graph["description"]
    assert {node["type"] for node in graph["nodes"]} & set(PROMISED)
    assert list(faults(*inside(graph))) == []
    for node in graph["nodes"]:
        ours = node["type"] in PROMISED
        assert node["properties"]["cnr_id"] == (PROJECT["name"] if ours else "comfy-core")


def test_the_app_shows_the_picture_and_inputs_that_exist():
    document = DOCUMENTS["SEG SDXL - app"]
    kinds = {node["id"]: node["type"] for node in document["nodes"]}
    shown = document["extra"]["linearData"]
    assert document["extra"]["linearMode"]
    assert [kinds[key] for key in shown["outputs"]] == ["SaveImage"]
    for key, name, *_ in shown["inputs"]:
        definition = DEFINITIONS[kinds[key]]["input"]
        assert name in {**definition["required"], **definition.get("optional", {})}
