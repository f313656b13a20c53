"""Workflows of other packs: the frontend offers our nodes for the missing ones."""

from __future__ import annotations

from frontend import keep_picture, open_workflow

THEIRS = {  # the widgets of a node, in its order
    "SEGAttention": [2.5, 4.0, False],
    "SmoothedEnergyGuidanceAdvanced": [1.5, -1.0, "middle", 0, -1.0, -1.0, 0.3, "partial", ""],
    "PerturbedAttention": [2.0, 0.0, "middle", 0, -1.0, -1.0, 0.2, "snf", ""],
}
OURS = [
    ["SEGuidance", {"scale": 2.5, "infinite_blur": False, "blur_sigma": 4}],
    [
        "SEGuidance",
        {"scale": 1.5, "infinite_blur": True, "rescale": 0.3, "rescale_mode": "partial"},
    ],
    ["SEGuidancePAG", {"scale": 2, "rescale": 0.2, "rescale_mode": "snf"}],
]
IN_GRAPH = """() => app.graph.nodes.filter(node => node.id > 1).map(node => [
    node.type,
    Object.fromEntries((node.widgets ?? []).map(widget => [widget.name, widget.value])),
    node.inputs.find(input => input.name === "model").link !== null,
])"""


def chain() -> dict:
    """Return a workflow of a loader and one node of each kind, one after the other."""
    nodes = [node(1, "CheckpointLoaderSimple", [], ["seg.safetensors"])]
    for index, (kind, values) in enumerate(THEIRS.items(), start=2):
        nodes.append(node(index, kind, [{"name": "model", "type": "MODEL", "link": index}], values))
    links = [[index, index - 1, 0, index, 0, "MODEL"] for index in range(2, len(nodes) + 1)]
    for index, each in enumerate(nodes, start=2):
        each["outputs"][0]["links"] = [index] if index <= len(nodes) else []
    return {"last_node_id": 4, "last_link_id": 4, "nodes": nodes, "links": links, "version": 0.4}


def node(key: int, kind: str, inputs: list, values: list) -> dict:
    place = {"id": key, "type": kind, "pos": [key * 340, 200], "size": [300, 260], "order": key}
    sockets = {"inputs": inputs, "outputs": [{"name": "MODEL", "type": "MODEL", "links": []}]}
    return {**place, **sockets, "flags": {}, "mode": 0, "properties": {}, "widgets_values": values}


def test_missing_nodes_of_other_packs_are_replaced_when_a_person_says_so(page):
    open_workflow(page, chain())
    assert [kind for kind, *_ in page.evaluate(IN_GRAPH)] == list(THEIRS)
    page.get_by_text("View details").first.click()
    page.get_by_text("Swap Nodes").first.wait_for()
    keep_picture(page, "replacements offered")
    page.get_by_role("button", name="Replace All").first.click()
    page.get_by_text("Replaced 3 node type").first.wait_for()
    page.wait_for_timeout(500)
    keep_picture(page, "replacements made")
    for (kind, widgets, is_linked), (ours, carried) in zip(
        page.evaluate(IN_GRAPH), OURS, strict=True
    ):
        assert kind == ours
        assert {**widgets, **carried} == widgets
        assert is_linked
