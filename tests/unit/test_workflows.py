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
    assert faults(document, DEFINITIONS) == []
    assert {node["type"] for node in document["nodes"]} & set(PROMISED)
    assert all(node["mode"] == 0 for node in document["nodes"])
    assert PROMPTS[name] == prompt_of(document, DEFINITIONS)
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
    assert faults(document, later) == []
    assert prompt_of(document, later) == PROMPTS[name]


@pytest.mark.parametrize(("part", "position"), [("optional", 0), ("required", None)])
def test_an_input_that_is_inserted_or_required_is_noticed(part, position):
    later = with_input(part, position)
    assert any(faults(document, later) for document in DOCUMENTS.values())


def first(document: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(node for node in document["nodes"] if node["type"] == kind)


def given(kind: str, position: int, value: Any):
    """Return what writes a value into the first node of this kind."""
    return lambda document: first(document, kind)["widgets_values"].__setitem__(position, value)


def socket(kind: str, position: int, **changed: Any):
    """Return what changes an input of the first node of this kind."""
    return lambda document: first(document, kind)["inputs"][position].update(changed)


PLANTED = {
    "is no node": lambda document: first(document, "VAEDecode").update(type="NoSuchNode"),
    "'sharp' for branch": given("SEGuidance", 6, "sharp"),
    "'full' for scale": given("SEGuidance", 0, "full"),
    "1 for infinite_blur": given("SEGuidance", 1, 1),
    "-1 for cfg": given("KSampler", 3, -1),
    "'randomize' for control": given("KSampler", 1, "randomize"),
    "no value for denoise": lambda document: first(document, "KSampler")["widgets_values"].pop(),
    "more values": lambda document: first(document, "SEGuidance")["widgets_values"].append(1),
    "no input latent": socket("KSampler", 3, name="latent"),
    "nothing connected to clip": socket("CLIPTextEncode", 0, link=None),
    "links and inputs": lambda document: document["links"].pop(),
    "links and outputs": lambda document: document["links"][0].__setitem__(1, 99),
    "to an input of another type": lambda document: document["links"][0].__setitem__(5, "VAE"),
    "last_node_id": lambda document: document["nodes"].append(document["nodes"][-1]),
}


@pytest.mark.parametrize(("words", "plant"), PLANTED.items(), ids=PLANTED)
def test_a_planted_fault_is_found(words, plant):
    document = copy.deepcopy(DOCUMENTS["SEG SDXL - text to image"])
    plant(document)
    assert any(words in fault for fault in faults(document, DEFINITIONS))


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


def queued(name: str, kind: str) -> list[dict[str, Any]]:
    """Return the inputs of a workflow's nodes of this kind, in order."""
    return [node["inputs"] for node in PROMPTS[name].values() if node["class_type"] == kind]


@pytest.mark.parametrize(
    "name", ["SEG SDXL - without a prompt", "SEG SDXL - ControlNet without a prompt"]
)
def test_without_a_prompt_means_cfg_1_and_one_empty_text(name):
    run = queued(name, "KSampler")[-1]
    source = PROMPTS[name][run["positive"][0]]
    conds = run
    if source["class_type"] == "ControlNetApplyAdvanced":
        conds = source["inputs"]
        source = PROMPTS[name][conds["positive"][0]]
    assert run["cfg"] == 1
    assert conds["positive"] == conds["negative"]
    assert source["inputs"]["text"] == ""
