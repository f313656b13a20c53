"""Every node as a person sees it, drawn on a canvas and drawn in the page (Nodes 2.0)."""

from __future__ import annotations

import json

import pytest
from frontend import EMPTY, ROOT, keep_picture, open_workflow

GOLDEN = json.loads((ROOT / "tests" / "goldens" / "node_inputs.json").read_text(encoding="utf-8"))
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
ALONE = """kind => {  // one node, at its own size, in the middle of an empty view
    for (const old of [...app.graph.nodes]) app.graph.remove(old);
    const node = LiteGraph.createNode(kind);
    app.graph.add(node);
    node.pos = [500, 150];
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [0, 0];
    app.canvas.setDirty(true, true);
}"""
ON_CANVAS = """() => {
    const [node] = app.graph.nodes;
    const shown = node.widgets?.filter(widget => !widget.hidden) ?? [];
    return {
        title: node.title,
        sockets: [...node.inputs.filter(one => !one.widget), ...node.outputs].map(
            one => one.label ?? one.localized_name ?? one.name),
        widgets: shown.map(one => one.name),
        values: Object.fromEntries(shown.map(one => [one.name, one.value])),
        places: Object.fromEntries(shown.map(
            one => [one.name, [node.pos[0] + 40, node.pos[1] + one.last_y + 10]])),
        bottoms: shown.map(one => one.last_y + 20),
        height: node.size[1],
    };
}"""
rendered = pytest.mark.parametrize("rendering", ["classic", "Nodes 2.0"], indirect=True)


def specs(host, node: str) -> dict:
    """Return the inputs of a node, each with its type and options."""
    parts = host.json(f"/object_info/{node}")[node]["input"]
    return {
        name: spec
        for part in ("required", "optional")
        for name, spec in parts.get(part, {}).items()
    }


def widget_names(inputs: dict) -> list[str]:
    return [
        name for name, (kind, *_) in inputs.items() if kind in WIDGETS or isinstance(kind, list)
    ]


def show(page, node: str) -> None:
    page.evaluate(ALONE, node)
    page.wait_for_timeout(1000)


@rendered
def test_every_node_shows_its_name_its_sockets_and_its_widgets(host, page, rendering):
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    open_workflow(page, EMPTY)
    for node in sorted(GOLDEN):
        show(page, node)
        inputs, name = specs(host, node), host.json(f"/object_info/{node}")[node]["display_name"]
        declared = widget_names(inputs)
        seen = page.evaluate(ON_CANVAS)
        assert seen["title"] == name
        assert [one for one in seen["widgets"] if one != "control_after_generate"] == declared
        defaults = {one: inputs[one][1].get("default", seen["values"][one]) for one in declared}
        assert {**seen["values"], **defaults} == seen["values"], node
        if rendering == "classic":
            assert all(bottom <= seen["height"] for bottom in seen["bottoms"]), node
        else:
            folded = [one for one in declared if inputs[one][1].get("advanced")]
            require_drawn_in_the_page(page, node, declared, folded)
            drawn = page.locator("[data-node-id]").inner_text().split("\n")
            assert {name, *seen["sockets"]} <= set(drawn)
        keep_picture(page, f"{node}, {rendering}")
    assert problems == []


def require_drawn_in_the_page(page, node: str, declared: list[str], folded: list[str]) -> None:
    """Advanced widgets are folded away until a person unfolds them."""
    labels = page.locator("[data-node-id]").get_by_test_id("widget-layout-field-label")
    assert labels.all_inner_texts() == [one for one in declared if one not in folded]
    if folded:
        keep_picture(page, f"{node}, folded")
        page.get_by_text("Show advanced inputs").click()
        labels.nth(len(declared) - 1).wait_for()
    assert labels.all_inner_texts() == declared
    assert all(label.is_visible() for label in labels.all())


@rendered
def test_tooltips_appear_over_widgets(host, page, rendering):
    open_workflow(page, EMPTY)
    show(page, "SEGuidance")
    for name in ("infinite_blur", "end_percent"):
        if rendering == "classic":
            x, y = page.evaluate(ON_CANVAS)["places"][name]
            left, top = page.evaluate(
                "() => { const box = app.canvas.canvas.getBoundingClientRect();"
                " return [box.left, box.top]; }"
            )
            page.mouse.move(left + x - 100, top + y)
            page.mouse.move(left + x, top + y, steps=3)
        else:
            page.get_by_test_id("widget-layout-field-label").get_by_text(name).hover()
        told = specs(host, "SEGuidance")[name][1]["tooltip"]
        shown = page.locator(".node-tooltip, [role=tooltip]").filter(has_text=told)
        shown.first.wait_for()
        keep_picture(page, f"tooltip of {name}, {rendering}")
        page.mouse.move(10, 900)
