"""What a person sees: workflows open whole, the node is found, nothing complains."""

from __future__ import annotations

import json
import re

import pytest
from choice import some
from frontend import EMPTY, WORKFLOWS, keep_picture, open_search, open_workflow

from dev import browser
from dev.templates import provide_models


def visible_complaints(page) -> list[str]:
    """Return what the frontend complains about: its error toast, and dialogs of any kind."""
    toasts = page.get_by_text(re.compile(r"^\d+ errors? found$|^missing (nodes?|models?)", re.I))
    dialogs = page.locator("[role=dialog], [role=alertdialog], .comfy-modal")
    entries = [*toasts.all(), *dialogs.all()]
    return [entry.inner_text() for entry in entries if entry.is_visible()]


@pytest.mark.parametrize("words", some(["SEG", "smoothed", "self-attention guidance"], "smoothed"))
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


@pytest.mark.parametrize("path", some(WORKFLOWS, WORKFLOWS[0]), ids=lambda path: path.stem)
def test_workflows_open_without_a_complaint_and_queue_their_api_copy(page, host, path):
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    workflow = json.loads(path.read_text(encoding="utf-8"))
    provide_models(host, workflow, next((host.base / "models" / "checkpoints").iterdir()))
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
    copy = json.loads((path.parent / "api" / path.name).read_text(encoding="utf-8"))
    queued = page.evaluate("() => app.graphToPrompt().then(made => made.output)")
    assert {key: node["class_type"] for key, node in queued.items()} == {
        key: node["class_type"] for key, node in copy.items()
    }
    for key, node in queued.items():  # an input younger than the files has its default
        assert node["inputs"] == {**node["inputs"], **copy[key]["inputs"]}
