"""What the tests of the frontend share: opening workflows, searching nodes, and screenshots."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import TimeoutError as PlaywrightTimeout

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
PICTURES = ROOT / ".artifacts" / "browser"
EMPTY = {"last_node_id": 0, "last_link_id": 0, "nodes": [], "links": [], "version": 0.4}


def keep_picture(page, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(PICTURES / f"{name}.png"))


def open_workflow(page, workflow: dict) -> None:
    """Open a workflow; a frontend that still starts may put its own in the place of it."""
    expected = sorted(node["type"] for node in workflow["nodes"])
    found = None
    for _ in range(5):
        page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        page.wait_for_timeout(2500)
        found = sorted(page.evaluate("() => app.graph.nodes.map(node => node.type)"))
        if found == expected:
            break
    assert found == expected
    page.keyboard.press(".")  # fit the view to the graph
    page.wait_for_timeout(1000)


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
