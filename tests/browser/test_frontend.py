"""What a person sees: workflows open whole, the node is found, nothing complains."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import TimeoutError as PlaywrightTimeout

from dev import browser
from dev.host import link_file

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
PICTURES = ROOT / ".artifacts" / "browser"
EMPTY = {"last_node_id": 0, "last_link_id": 0, "nodes": [], "links": [], "version": 0.4}


def keep_picture(page, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(PICTURES / f"{name}.png"))


def visible_complaints(page) -> list[str]:
    """Return what the frontend complains about: its error toast, and dialogs of any kind."""
    toasts = page.get_by_text(re.compile(r"^\d+ errors? found$|^missing (nodes?|models?)", re.I))
    dialogs = page.locator("[role=dialog], [role=alertdialog], .comfy-modal")
    entries = [*toasts.all(), *dialogs.all()]
    return [entry.inner_text() for entry in entries if entry.is_visible()]


def open_workflow(page, workflow: dict) -> None:
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.wait_for_timeout(2500)
    page.keyboard.press(".")  # fit the view to the graph
    page.wait_for_timeout(1000)


def provide_files(host, workflow: dict, model: Path) -> None:
    """Place files under the names that a workflow loads: their absence is not its fault."""
    for node in workflow["nodes"]:
        for wanted in node["properties"].get("models", []):
            target = host.base / "models" / wanted["directory"] / wanted["name"]
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                link_file(model, target)
        if node["type"] == "LoadImage":
            Image.new("RGB", (64, 64)).save(host.base / "input" / node["widgets_values"][0])


def test_the_node_is_drawn_with_all_its_widgets(page):
    open_workflow(page, EMPTY)
    names = page.evaluate(
        """() => {
            const node = LiteGraph.createNode("SEGuidance");
            app.graph.add(node);
            node.pos = [300, 200];
            return node.widgets.map(widget => widget.name);
        }"""
    )
    info = json.loads((ROOT / "tests" / "goldens" / "node_inputs.json").read_text())["SEGuidance"]
    declared = [name for part in info["input_order"].values() for name in part]
    assert names == [name for name in declared if name != "model"]
    page.wait_for_timeout(500)
    keep_picture(page, "node")


def open_search(page):
    """Open the search for nodes; on a busy machine two clicks may come too far apart."""
    field = page.get_by_placeholder("Add a node")
    for _ in range(10):
        page.mouse.dblclick(800, 600)
        try:
            field.wait_for(timeout=5000)
        except PlaywrightTimeout:
            continue
        return field
    raise AssertionError("a double click on the canvas does not open the search")


@pytest.mark.parametrize("words", ["SEG", "smoothed", "self-attention guidance"])
def test_the_node_is_found_by_searching(page, words):
    open_workflow(page, EMPTY)
    open_search(page).fill(words)
    found = page.get_by_role("dialog").get_by_text("Smoothed Energy Guidance (SEG)").first
    found.wait_for()
    page.wait_for_timeout(500)
    keep_picture(page, f"search {words}")
    assert found.is_visible()


def test_a_complaint_would_be_noticed(page):
    lost = {"id": 1, "type": "NoSuchNode", "pos": [300, 200], "size": [200, 100], "flags": {}}
    node = {**lost, "order": 0, "mode": 0, "properties": {}}
    open_workflow(page, {**EMPTY, "nodes": [node], "last_node_id": 1})
    keep_picture(page, "missing node")
    assert visible_complaints(page) != []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_open_without_a_complaint(page, host, path):
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    workflow = json.loads(path.read_text(encoding="utf-8"))
    provide_files(host, workflow, next((host.base / "models" / "checkpoints").iterdir()))
    page.reload()
    page.wait_for_function(browser.READY)
    open_workflow(page, workflow)
    state = page.evaluate(
        """() => ({
            types: app.graph.nodes.map(node => node.type),
            broken: app.graph.nodes.filter(node => node.has_errors).map(node => node.type),
        })"""
    )
    keep_picture(page, path.stem)
    assert sorted(state["types"]) == sorted(node["type"] for node in workflow["nodes"])
    assert state["broken"] == []
    assert visible_complaints(page) == []
    assert problems == []
