"""A workflow on a sheet: nodes placed in titled groups, written as ComfyUI's UI and API files.

What the shipped workflows contain is in `workflows`; this file knows only how such files look.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NOTE = "MarkdownNote"
SIZES = {  # at least what the frontend computes, in both of its ways to draw nodes
    "CheckpointLoaderSimple": (400, 110),
    "SEGuidance": (340, 310),
    "SEGuidanceSAG": (340, 310),
    "SEGuidancePAG": (340, 260),
    "SEGuidanceTPG": (340, 260),
    "SEGuidanceSLG": (340, 260),
    "SEGuidanceProbe": (340, 60),
    "SEGuidanceReport": (560, 1060),
    "SEGuidanceSweep": (400, 420),
    "PreviewAny": (560, 200),
    "UNETLoader": (400, 90),
    "CLIPLoader": (400, 120),
    "VAELoader": (400, 70),
    "EmptySD3LatentImage": (400, 120),
    "ModelSamplingAuraFlow": (340, 70),
    "ConditioningZeroOut": (400, 40),
    "CLIPTextEncode": (400, 180),
    "EmptyLatentImage": (400, 120),
    "KSampler": (340, 270),
    "VAEDecode": (340, 60),
    "SaveImage": (560, 700),
    "PreviewImage": (340, 380),
    "ImageStitch": (340, 160),
    "Canny": (340, 100),
    "ControlNetLoader": (400, 70),
    "ControlNetApplyAdvanced": (340, 210),
    "PrimitiveInt": (400, 90),
    "PrimitiveFloat": (400, 70),
}
NODE_TITLE, GROUP_TITLE, GAP, MARGIN, SPACE = 30, 40, 30, 20, 40
OPTIONAL_SHAPE = 7
WINDOW = (1760, 840)  # of the frontend, in an ordinary browser
CORNER = (90, 100)  # what its bars cover
READABLE = 0.58  # below this zoom the frontend draws no text
NAMESPACE = uuid.UUID("6f0d1f3e-2f0a-5c55-9a53-3a3f2f3d2408")


@dataclass(frozen=True)
class Pack:
    """Where nodes come from, as the Manager wants to know."""

    cnr_id: str
    ver: str


@dataclass
class Node:
    """One node of a sheet; `node["MODEL"]` is its output of that name."""

    key: int
    kind: str
    at: tuple[int, int]
    size: tuple[int, int]
    inputs: dict[str, Any]
    title: str | None = None
    models: list[dict[str, str]] = field(default_factory=list)

    def __getitem__(self, output: str) -> Output:
        return Output(self, output)


@dataclass(frozen=True)
class Output:
    """An output of a node."""

    node: Node
    name: str


class Group:
    """A titled frame whose nodes stand below one another."""

    def __init__(self, sheet: Sheet, title: str, at: tuple[int, int]) -> None:
        self.sheet = sheet
        self.title = title
        self.at = at
        self.nodes: list[Node] = []
        self._below = at[1] + GROUP_TITLE + NODE_TITLE

    def add(
        self, kind: str, *, size: tuple[int, int] | None = None, room: int = 0, **inputs: Any
    ) -> Node:
        """Put a node below the others; `room` is how much height to keep for it at least."""
        x = self.at[0] + MARGIN
        node = self.sheet.add(kind, at=(x, self._below), size=size, **inputs)
        self._below += max(node.size[1], room) + NODE_TITLE + GAP
        self.nodes.append(node)
        return node

    @property
    def right(self) -> int:
        """Where the frame ends."""
        return self.at[0] + max(node.size[0] for node in self.nodes) + 2 * MARGIN

    @property
    def bottom(self) -> int:
        """Where the frame ends downwards."""
        return self._below - NODE_TITLE - GAP + MARGIN

    def beside(self) -> tuple[int, int]:
        """Return the place for a frame at the top of the next column."""
        return self.right + SPACE, 0

    def under(self) -> tuple[int, int]:
        """Return the place for a frame below this one."""
        return self.at[0], self.bottom + SPACE


class Sheet:
    """One workflow.

    Args:
        name: the file's name, which ComfyUI shows as the title.
        definitions: `/object_info` of the nodes used.
        packs: the pack of each node that is not ComfyUI's own, and under `""` ComfyUI.
    """

    def __init__(
        self, name: str, definitions: Mapping[str, Any], packs: Mapping[str, Pack]
    ) -> None:
        self.name = name
        self.definitions = definitions
        self.packs = packs
        self.nodes: list[Node] = []
        self.groups: list[Group] = []

    def group(self, title: str, at: tuple[int, int]) -> Group:
        """Open a frame at a place."""
        self.groups.append(Group(self, title, at))
        return self.groups[-1]

    def add(
        self,
        kind: str,
        *,
        at: tuple[int, int],
        size: tuple[int, int] | None = None,
        title: str | None = None,
        models: list[dict[str, str]] | None = None,
        **inputs: Any,
    ) -> Node:
        """Put a node at a place."""
        size = size or SIZES[kind]
        node = Node(len(self.nodes) + 1, kind, at, size, inputs, title, models or [])
        self.nodes.append(node)
        return node

    def note(self, size: tuple[int, int], title: str, text: str) -> Node:
        """Put a Markdown note in the upper left corner."""
        return self.add(NOTE, at=(0, NODE_TITLE), size=size, title=title, text=text.strip() + "\n")

    def api(self) -> dict[str, Any]:
        """Return the graph as `/prompt` takes it."""
        return {
            str(node.key): {
                "inputs": {name: self._api_value(node, name) for name in self._names(node)},
                "class_type": node.kind,
                "_meta": {"title": node.title or self.definitions[node.kind]["display_name"]},
            }
            for node in self.nodes
            if node.kind != NOTE
        }

    def ui(self) -> dict[str, Any]:
        """Return the document that the frontend opens, in version 0.4 of its format."""
        links = self._links()
        return {
            "id": str(uuid.uuid5(NAMESPACE, self.name)),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(links),
            "nodes": [self._ui_node(order, node, links) for order, node in enumerate(self.nodes)],
            "links": links,
            "groups": [_ui_group(key, group) for key, group in enumerate(self.groups, 1)],
            "config": {},
            "extra": {"ds": self._view()},
            "version": 0.4,
        }

    def _names(self, node: Node) -> list[str]:
        """Return the names of the inputs in the order of the frontend: sockets, then widgets."""
        names = _inputs(self.definitions[node.kind])
        used = [name for name in names if name in node.inputs or self._is_widget(node, name)]
        return sorted(used, key=lambda name: self._is_widget(node, name))

    def _is_widget(self, node: Node, name: str) -> bool:
        return type_name(_inputs(self.definitions[node.kind])[name]) in WIDGETS

    def _value(self, node: Node, name: str) -> Any:
        """Return what the widget of an input shows."""
        value = node.inputs.get(name)
        if value is None or isinstance(value, Output):
            kind, options = _inputs(self.definitions[node.kind])[name][:2]
            default = options["default"] if "default" in options else kind[0]
            value = value.node.inputs["value"] if value is not None else default
        return value

    def _api_value(self, node: Node, name: str) -> Any:
        value = node.inputs.get(name)
        if isinstance(value, Output):
            return [str(value.node.key), self._slot(value)]
        return self._value(node, name)

    def _slot(self, output: Output) -> int:
        return self.definitions[output.node.kind]["output_name"].index(output.name)

    def _links(self) -> list[list[Any]]:
        links: list[list[Any]] = []
        for node in self.nodes:
            for slot, name in enumerate(self._sockets(node)):
                source = node.inputs.get(name)
                if isinstance(source, Output):
                    start = [source.node.key, self._slot(source)]
                    kind = self.definitions[source.node.kind]["output"][start[1]]
                    links.append([len(links) + 1, *start, node.key, slot, kind])
        return links

    def _sockets(self, node: Node) -> list[str]:
        """Return the names of all inputs a link can go to, in the order of the frontend."""
        if node.kind == NOTE:
            return []
        names = _inputs(self.definitions[node.kind])
        return sorted(names, key=lambda name: self._is_widget(node, name))

    def _ui_node(self, order: int, node: Node, links: list[list[Any]]) -> dict[str, Any]:
        pack = self.packs.get(node.kind, self.packs[""])
        properties: dict[str, Any] = {
            "Node name for S&R": node.kind,
            "cnr_id": pack.cnr_id,
            "ver": pack.ver,
        }
        if node.models:
            properties["models"] = node.models
        return {
            "id": node.key,
            "type": node.kind,
            "pos": list(node.at),
            "size": list(node.size),
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": self._ui_inputs(node, links),
            "outputs": self._ui_outputs(node, links),
            **({"title": node.title} if node.title else {}),
            "properties": properties,
            "widgets_values": self._widgets_values(node),
            **({"color": "#222", "bgcolor": "#000"} if node.kind == NOTE else {}),
            **({"color": "#232", "bgcolor": "#353"} if node.kind in self.packs else {}),
        }

    def _ui_inputs(self, node: Node, links: list[list[Any]]) -> list[dict[str, Any]]:
        into = {(link[3], link[4]): link[0] for link in links}
        inputs = []
        for slot, name in enumerate(self._sockets(node)):
            definition = self.definitions[node.kind]
            entry: dict[str, Any] = {"name": name, "type": type_name(_inputs(definition)[name])}
            if name in definition["input"].get("optional", {}):
                entry["shape"] = OPTIONAL_SHAPE
            if self._is_widget(node, name):
                entry["widget"] = {"name": name}
            inputs.append({**entry, "link": into.get((node.key, slot))})
        return inputs

    def _ui_outputs(self, node: Node, links: list[list[Any]]) -> list[dict[str, Any]]:
        if node.kind == NOTE:
            return []
        definition = self.definitions[node.kind]
        outputs = []
        pairs = zip(definition["output_name"], definition["output"], strict=True)
        for slot, (name, kind) in enumerate(pairs):
            out = [link[0] for link in links if link[1:3] == [node.key, slot]]
            outputs.append({"name": name, "type": kind, "links": out or None})
        return outputs

    def _widgets_values(self, node: Node) -> list[Any]:
        if node.kind == NOTE:
            return [node.inputs["text"]]
        values: list[Any] = []
        for name, spec in _inputs(self.definitions[node.kind]).items():
            if self._is_widget(node, name):
                values.append(self._value(node, name))
                if len(spec) > 1 and spec[1].get("control_after_generate"):
                    values.append("fixed")
        return values

    def _view(self) -> dict[str, Any]:
        """Return the zoom and offset that show the whole sheet in an ordinary window."""
        right = max(group.right for group in self.groups)
        bottom = max(group.bottom for group in self.groups)
        scale = min(1.0, WINDOW[0] / right, WINDOW[1] / bottom)
        scale = max(READABLE, int(scale * 100) / 100)
        return {"scale": scale, "offset": [round(place / scale) for place in CORNER]}


def type_name(spec: list[Any]) -> str:
    """Return the type of an input; ComfyUI has two ways to write COMBO."""
    return "COMBO" if isinstance(spec[0], list) else spec[0]


def text(document: Any) -> str:
    """Return a JSON document as it is written to files."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _inputs(definition: Mapping[str, Any]) -> dict[str, list[Any]]:
    parts = definition["input"]
    order = definition["input_order"]
    return {
        name: parts[part][name] for part in ("required", "optional") for name in order.get(part, [])
    }


def _ui_group(key: int, group: Group) -> dict[str, Any]:
    width, height = group.right - group.at[0], group.bottom - group.at[1]
    return {
        "id": key,
        "title": group.title,
        "bounding": [*group.at, width, height],
        "color": "#3f789e",
        "flags": {},
    }
