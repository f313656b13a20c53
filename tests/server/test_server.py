"""The pack in the real server: what it registers, serves, renders and refuses."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from choice import some
from PIL import Image

from dev import graphs
from dev.answers import execution_error, refusal
from dev.evaluation import checkpoint, demo, measures, settings
from dev.evaluation.render import Plan, pictures, render
from dev.host import Server
from dev.places import PACK_FOLDER
from dev.stock_checkpoint import CHECKPOINT

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
BLUEPRINTS = sorted(path.stem for path in (ROOT / "subgraphs").glob("*.json"))
SHIPPED = sorted((ROOT / "example_workflows" / "api").glob("*.json"))
KINDS = [
    path
    for path in SHIPPED
    if path.stem.endswith(("SDXL - text to image", "ControlNet without a prompt"))
]
GOLDEN = json.loads((ROOT / "tests" / "goldens" / "node_inputs.json").read_text())


def pixels(host: Server, outputs: dict[str, Any]) -> np.ndarray:
    found = [
        np.asarray(Image.open(io.BytesIO(host.image_bytes(image))).convert("RGB"), dtype=float)
        for _, output in sorted(outputs.items())
        for image in output.get("images", [])
    ]
    assert found, "the workflow shows no picture"
    return np.concatenate([image.ravel() for image in found])


def text_to_image(**guidance: Any) -> graphs.Graph:
    """Return the smallest whole workflow with the guidance node."""
    plan = Plan(checkpoint.sources(CHECKPOINT, (64, 96)), ["a cat"], 2, 4.0)
    inputs = {**settings.seg(math.inf, 3.0).inputs, **guidance}
    return plan.graph(settings.Setting("", "SEG", graphs.GUIDANCE, inputs), "a cat", 1)


def failure(host: Server, graph: graphs.Graph) -> str:
    """Queue a graph that must fail; return what the person is told."""
    status, answer = host.post("/prompt", {"prompt": graph})
    if status != 200:
        return refusal(answer)
    error = execution_error(host.finished(answer["prompt_id"]))
    assert error is not None, "the workflow ran, but it should have been refused"
    return f"{error['node_type']}: {error['exception_message']}"


def test_the_pack_loads_without_a_complaint(host):
    lines = [line for line in host.lines if PACK_FOLDER in line or "SEG" in line]
    assert any(PACK_FOLDER in line for line in lines)
    everything = host.json("/object_info")
    ours = {k for k, v in everything.items() if v["python_module"].endswith("." + PACK_FOLDER)}
    assert ours == set(GOLDEN)
    assert not [line for line in lines if "FAILED" in line or "Error" in line or "WARNING" in line]


@pytest.mark.parametrize("node", sorted(GOLDEN))
def test_nodes_are_registered_exactly_as_declared_with_tooltips_and_help(host, node):
    info = host.json(f"/object_info/{node}")[node]
    declared = {part: names for part, names in info["input_order"].items() if part != "hidden"}
    assert declared == GOLDEN[node]["input_order"]
    assert info["output"] == GOLDEN[node]["output"]
    inputs = {**info["input"]["required"], **info["input"].get("optional", {})}
    for name, (_, *options) in inputs.items():
        assert options, name
        assert options[0].get("tooltip"), name
    assert host.get(f"/extensions/{PACK_FOLDER}/docs/{node}.md")


def test_replacing_a_node_of_another_pack_is_offered_and_never_done_unasked(host):
    old = "SEGAttention"
    assert old in host.json("/node_replacements")
    graph = text_to_image()
    graph["guidance"] = {"class_type": old, "inputs": {"model": ["model", 0]}, "_meta": {}}
    assert "not found" in failure(host, graph)


def test_templates_and_blueprints_are_offered_under_the_name_of_the_pack(host):
    assert sorted(host.json("/workflow_templates")[PACK_FOLDER]) == TEMPLATES
    offered = host.json("/global_subgraphs").values()
    ours = (entry for entry in offered if entry["info"]["node_pack"].endswith(PACK_FOLDER))
    assert sorted(entry["name"] for entry in ours) == BLUEPRINTS


@pytest.mark.parametrize("path", some(SHIPPED, *KINDS), ids=lambda path: path.stem)
def test_shipped_workflows_run_and_differ_from_off(host, path):
    graph = graphs.for_stock_test(json.loads(path.read_text(encoding="utf-8")))
    saved = {key for key, _ in graphs.of_class(graph, "SaveImage")}
    runs = (host.run(each) for each in (graph, graphs.without_guidance(graph)))
    guided, plain = (pixels(host, {k: v for k, v in run.items() if k in saved}) for run in runs)
    assert guided.std() > 5  # neither black nor flat: random weights still make texture
    assert np.abs(guided - plain).max() > 1


BAD = {
    "unknown block": ({"blocks": "d99"}, ["d99"]),
    "start after end": ({"start_percent": 0.8, "end_percent": 0.2}, ["start", "end"]),
    "NaN sigma": ({"infinite_blur": False, "blur_sigma": float("nan")}, ["sigma"]),
    "no number": ({"scale": "strong"}, ["scale"]),
}


@pytest.mark.parametrize(("guidance", "words"), BAD.values(), ids=BAD)
def test_bad_input_names_node_and_cause_and_the_server_goes_on(host, guidance, words):
    message = failure(host, text_to_image(**guidance))
    assert graphs.GUIDANCE in message
    for word in words:
        assert word in message
    assert host.run(text_to_image())


def one_of_each(host, folder, plan: Plan, grid: list[settings.Setting]) -> dict[str, np.ndarray]:
    """Return the pictures of one job of each setting, by its name."""
    jobs = {each.name: plan.jobs(each, range(plan.batch), folder, "")[0] for each in grid}
    render(host, list(jobs.values()), 300.0)
    return {name: np.stack(list(pictures(job.files))) for name, job in jobs.items()}


GRIDS = (settings.shown_grid, settings.demo_grid)


@pytest.mark.parametrize("grid", some(GRIDS, settings.shown_grid))
def test_the_demo_model_is_sampled_with_each_setting(host, tmp_path, grid):
    plan = Plan(demo.sources, ["blue"], 3, 2.0, batch=2)
    images = one_of_each(host, tmp_path, plan, grid())
    plain = images.pop(graphs.OFF)
    assert plain.shape == (2, 32, 32, 3)
    assert all(measures.moved(guided, plain) > 0.005 for guided in images.values())


@pytest.mark.long
def test_the_evaluation_samples_a_checkpoint(host, tmp_path):
    plan = Plan(checkpoint.sources(CHECKPOINT, (64, 96)), ["a cat"], 2, 4.0)
    grid = settings.checkpoint_grid([1.0, math.inf], [3.0])
    images = one_of_each(host, tmp_path, plan, grid)
    plain = images.pop(graphs.OFF)
    assert plain.shape == (1, 96, 64, 3)
    assert all(np.abs(guided - plain).max() > 0 for guided in images.values())
