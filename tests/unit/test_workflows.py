"""The shipped workflows as files: valid, closed, installable by the Manager, and in step.

What only a running ComfyUI can tell (they are served, they run, the frontend opens them) is in
`tests/server` and `tests/browser`.
"""

from __future__ import annotations

import json
import re
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from dev import workflows
from dev.workflow_sheet import text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "example_workflows"
FILES = sorted(FOLDER.glob("*.json"))
DOCUMENTS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FILES}
DEFINITIONS = json.loads(workflows.DEFINITIONS.read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NODE_TITLE = 30
EXTENSIONS = (".safetensors", ".sft", ".ckpt", ".pth", ".pt")

NUMBERS = {"type": "array", "items": {"type": "number"}}
PAIR = {**NUMBERS, "minItems": 2, "maxItems": 2}
SLOT = {
    "type": "object",
    "required": ["name", "type"],
    "properties": {
        "name": {"type": "string"},
        "type": {"type": "string"},
        "link": {"type": ["integer", "null"]},
        "links": {"type": ["array", "null"], "items": {"type": "integer"}},
    },
}
NODE = {
    "type": "object",
    "required": ["id", "type", "pos", "size", "flags", "order", "mode", "properties"],
    "properties": {
        "id": {"type": "integer"},
        "type": {"type": "string"},
        "pos": PAIR,
        "size": PAIR,
        "flags": {"type": "object"},
        "order": {"type": "integer"},
        "mode": {"const": 0},
        "inputs": {"type": "array", "items": SLOT},
        "outputs": {"type": "array", "items": SLOT},
        "properties": {"type": "object", "required": ["Node name for S&R", "cnr_id", "ver"]},
        "widgets_values": {"type": "array"},
        "color": {"type": "string"},
        "bgcolor": {"type": "string"},
    },
}
GROUP = {
    "type": "object",
    "required": ["title", "bounding"],
    "properties": {
        "title": {"type": "string", "minLength": 1},
        "bounding": {**NUMBERS, "minItems": 4, "maxItems": 4},
    },
}
LINK = {"type": "array", "minItems": 6, "maxItems": 6}
# The format 0.4 as Comfy-Org/docs describes it, as far as these files use it.
SCHEMA = {
    "type": "object",
    "required": ["last_node_id", "last_link_id", "nodes", "links", "version"],
    "properties": {
        "id": {"type": "string", "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"},
        "revision": {"type": "integer"},
        "last_node_id": {"type": "integer"},
        "last_link_id": {"type": "integer"},
        "nodes": {"type": "array", "items": NODE, "minItems": 1},
        "links": {"type": "array", "items": LINK},
        "groups": {"type": "array", "items": GROUP, "minItems": 1},
        "config": {"type": "object"},
        "extra": {
            "type": "object",
            "required": ["ds"],
            "properties": {
                "ds": {
                    "type": "object",
                    "required": ["scale", "offset"],
                    "properties": {"scale": {"type": "number"}, "offset": PAIR},
                }
            },
        },
        "version": {"const": 0.4},
    },
}


@pytest.fixture(params=DOCUMENTS)
def name(request) -> str:
    return request.param


@pytest.fixture
def document(name) -> dict[str, Any]:
    return DOCUMENTS[name]


def graph_nodes(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [node for node in document["nodes"] if node["type"] != "MarkdownNote"]


def specs(kind: str) -> dict[str, list[Any]]:
    """Return the inputs of a node class in the order ComfyUI declares them."""
    parts = DEFINITIONS[kind]["input"]
    order = DEFINITIONS[kind]["input_order"]
    return {key: parts[part][key] for part in parts for key in order[part]}


def kind_of(spec: list[Any]) -> str:
    return "COMBO" if isinstance(spec[0], list) else spec[0]


def widgets(kind: str) -> list[tuple[str, list[Any]]]:
    """Return what stands in `widgets_values`; `None` for the control behind a seed."""
    found: list[tuple[str, Any]] = []
    for key, spec in specs(kind).items():
        if kind_of(spec) in WIDGETS:
            found.append((key, spec))
            if spec[1].get("control_after_generate"):
                found.append(("", None))
    return found


def converted(document: dict[str, Any]) -> dict[str, Any]:
    """Convert a UI file to an API prompt; written without a look at the generator."""
    origins = {link[0]: [str(link[1]), link[2]] for link in document["links"]}
    prompt = {}
    for node in graph_nodes(document):
        keys = [key for key, _ in widgets(node["type"])]
        inputs = dict(zip(keys, node["widgets_values"], strict=True))
        inputs.pop("", None)
        linked = {i["name"]: i["link"] for i in node["inputs"] if i["link"] is not None}
        inputs |= {key: origins[link] for key, link in linked.items()}
        title = node.get("title") or DEFINITIONS[node["type"]]["display_name"]
        prompt[str(node["id"])] = {
            "inputs": inputs,
            "class_type": node["type"],
            "_meta": {"title": title},
        }
    return prompt


def test_every_workflow_is_there():
    assert set(DOCUMENTS) == set(workflows.WORKFLOWS)
    assert len(DOCUMENTS) >= 8


def test_file_names_can_stand_in_a_url_and_none_is_taken():
    assert all(re.fullmatch(r"[A-Za-z0-9 -]+", path.stem) for path in FILES)
    assert "index" not in DOCUMENTS


def test_files_are_what_the_generator_writes():
    made = workflows.documents(DEFINITIONS)
    for path, content in made.items():
        assert (FOLDER / path).read_text(encoding="utf-8") == text(content), (
            f"{path} is out of step: run `python -m dev.workflows --offline`"
        )
    shipped = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.json")}
    assert shipped == set(made)


def test_the_document_follows_format_0_4(document):
    jsonschema.Draft202012Validator(SCHEMA).validate(document)


def test_ids_are_unique_and_below_the_last(document):
    nodes = [node["id"] for node in document["nodes"]]
    links = [link[0] for link in document["links"]]
    assert len(set(nodes)) == len(nodes)
    assert len(set(links)) == len(links)
    assert max(nodes) == document["last_node_id"]
    assert max(links) == document["last_link_id"]
    assert sorted(node["order"] for node in document["nodes"]) == list(range(len(nodes)))


def test_every_link_has_both_its_ends_and_the_right_type(document):
    nodes = {node["id"]: node for node in document["nodes"]}
    for key, origin, output, target, slot, kind in document["links"]:
        assert key in nodes[origin]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == key
        assert nodes[origin]["outputs"][output]["type"] == kind
        assert nodes[target]["inputs"][slot]["type"] in (kind, "*")
        assert nodes[origin]["order"] < nodes[target]["order"]
    named = {i["link"] for node in nodes.values() for i in node["inputs"]} - {None}
    given = {key for node in nodes.values() for o in node["outputs"] for key in o["links"] or []}
    assert named == given == {link[0] for link in document["links"]}


def test_only_nodes_of_comfyui_and_ours_are_used(document):
    kinds = {node["type"] for node in graph_nodes(document)}
    assert kinds <= set(workflows.CORE) | set(workflows.OURS)
    assert kinds & set(workflows.OURS)


def test_slots_are_those_of_the_definitions_in_the_order_of_the_frontend(document):
    for node in graph_nodes(document):
        declared = specs(node["type"])
        sockets = [key for key, spec in declared.items() if kind_of(spec) not in WIDGETS]
        others = [key for key, spec in declared.items() if kind_of(spec) in WIDGETS]
        assert [entry["name"] for entry in node["inputs"]] == sockets + others
        for entry in node["inputs"]:
            assert entry["type"] == kind_of(declared[entry["name"]])
            assert entry.get("widget", {}).get("name") == (
                entry["name"] if entry["name"] in others else None
            )
        definition = DEFINITIONS[node["type"]]
        assert [entry["name"] for entry in node["outputs"]] == definition["output_name"]
        assert [entry["type"] for entry in node["outputs"]] == definition["output"]


def test_required_inputs_are_connected(document):
    for node in graph_nodes(document):
        required = DEFINITIONS[node["type"]]["input"]["required"]
        for entry in node["inputs"]:
            if entry["name"] in required and "widget" not in entry:
                assert entry["link"] is not None, f"{node['type']}.{entry['name']}"


def test_widget_values_are_allowed_and_seeds_are_fixed(document):
    for node in graph_nodes(document):
        pairs = zip(widgets(node["type"]), node["widgets_values"], strict=True)
        for (key, spec), value in pairs:
            if spec is None:
                assert value == "fixed"
                continue
            where = f"{node['type']}.{key} = {value!r}"
            options = spec[1]
            choices = spec[0] if isinstance(spec[0], list) else options.get("options")
            assert not choices or value in choices, where
            assert options.get("min", value) <= value <= options.get("max", value), where
            if kind_of(spec) == "BOOLEAN":
                assert isinstance(value, bool), where


def test_every_node_names_its_pack(document):
    for node in document["nodes"]:
        properties = node["properties"]
        assert properties["Node name for S&R"] == node["type"]
        ours = node["type"] in workflows.OURS
        expected = (PROJECT["name"], PROJECT["version"]) if ours else ("comfy-core", "0.30.0")
        assert (properties["cnr_id"], properties["ver"]) == expected


DIRECTORIES = {
    "CheckpointLoaderSimple": "checkpoints",
    "ControlNetLoader": "controlnet",
    "UNETLoader": "diffusion_models",
    "CLIPLoader": "text_encoders",
    "VAELoader": "vae",
}


def test_loaders_say_where_their_models_come_from(document):
    loaders = [node for node in document["nodes"] if "Loader" in node["type"]]
    assert loaders
    for node in loaders:
        (model,) = node["properties"]["models"]
        assert set(model) == {"name", "url", "directory"}
        assert model["name"] == node["widgets_values"][0]
        assert model["name"].endswith(EXTENSIONS)
        assert re.match(r"https://huggingface\.co/[^/]+/[^/]+/resolve/", model["url"])
        assert model["url"].endswith("/" + model["name"])
        assert model["directory"] == DIRECTORIES[node["type"]]


def test_a_note_says_what_to_change_and_what_to_expect(document):
    note = next(node for node in document["nodes"] if node["type"] == "MarkdownNote")
    (words,) = note["widgets_values"]
    assert "**To change**" in words
    assert "**To expect**" in words
    loaders = [node for node in document["nodes"] if "Loader" in node["type"]]
    for loader in loaders:
        assert loader["widgets_values"][0].removesuffix(".safetensors") in words


def test_no_file_of_a_person_is_needed(document):
    assert not [node for node in document["nodes"] if node["type"].startswith("LoadImage")]


def test_nodes_do_not_overlap(document):
    frames = []
    for node in document["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        frames.append((node["id"], x, y - NODE_TITLE, x + width, y + height))
    for (one, *a), (other, *b) in combinations(frames, 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"nodes {one} and {other} overlap"


def test_groups_frame_whole_nodes_and_not_one_another(document):
    frames = [group["bounding"] for group in document["groups"]]
    for a, b in combinations(frames, 2):
        apart = a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0]
        assert apart or a[1] + a[3] <= b[1] or b[1] + b[3] <= a[1]
    for node in graph_nodes(document):
        (x, y), (width, height) = node["pos"], node["size"]
        assert any(
            left <= x and top <= y - NODE_TITLE and x + width <= left + w and y + height <= top + h
            for left, top, w, h in frames
        ), f"{node['type']} stands outside every group"


def test_the_api_copy_is_the_same_graph(name, document):
    copy = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
    assert copy == converted(document)


def test_definitions_of_our_nodes_are_the_promised_ones():
    promised = json.loads((ROOT / "tests" / "goldens" / "node_inputs.json").read_text())
    for kind in workflows.OURS:
        assert DEFINITIONS[kind]["input_order"] == promised[kind]["input_order"]
        assert DEFINITIONS[kind]["output"] == promised[kind]["output"]


def settings(name: str) -> list[dict[str, Any]]:
    """Return the inputs of the guidance nodes of a workflow, in order."""
    graph = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
    return [node["inputs"] for node in graph.values() if node["class_type"] in workflows.OURS]


def samplers(name: str) -> list[dict[str, Any]]:
    graph = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
    return [node["inputs"] for node in graph.values() if node["class_type"] == "KSampler"]


def test_the_comparison_has_one_seed_and_off_1_4_16_infinite():
    guides = settings("SEG SDXL - five widths of the blur")
    widths = [None if each["infinite_blur"] else each["blur_sigma"] for each in guides]
    assert widths == [1.0, 4.0, 16.0, None]
    runs = samplers("SEG SDXL - five widths of the blur")
    assert len(runs) == 5
    for shared in ("seed", "cfg", "steps", "positive", "negative", "latent_image"):
        assert all(run[shared] == runs[0][shared] for run in runs), shared
    assert len({run["model"][0] for run in runs}) == 5


@pytest.mark.parametrize(
    "file", ["SEG SDXL - without a prompt", "SEG SDXL - ControlNet without a prompt"]
)
def test_without_a_prompt_means_cfg_1_and_one_empty_text(file):
    graph = json.loads((FOLDER / "api" / f"{file}.json").read_text(encoding="utf-8"))
    run = next(run for run in reversed(samplers(file)))
    assert run["cfg"] == 1.0
    source = graph[run["positive"][0]]
    if source["class_type"] == "ControlNetApplyAdvanced":
        assert source["inputs"]["positive"] == source["inputs"]["negative"]
        source = graph[source["inputs"]["positive"][0]]
    else:
        assert run["positive"] == run["negative"]
    assert source["inputs"]["text"] == ""
