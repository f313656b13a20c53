"""Save the shipped workflows as the real frontend does: `python -m dev.templates [NAME ...]`.

The source of a workflow is `example_workflows/NAME.json`, drawn in ComfyUI (`dev.py serve`) and
exported there. This opens it in a headless browser, saves it again, and writes what goes with
it: its API copy in `api/`, and the picture on its card in ComfyUI's template browser. Subgraph
blueprints, `subgraphs/NAME.json`, are only saved again.
"""

from __future__ import annotations

import json
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

from dev import browser
from dev.comfy_tree import CURRENT, pinned_tree
from dev.host import Server
from dev.machine import link_file
from dev.places import DEMO_PACK, PACK_FOLDER, ROOT
from dev.say import Failure, say

FOLDER = ROOT / "example_workflows"
BLUEPRINTS = ROOT / "subgraphs"
WINDOW = {"width": 1400, "height": 1400}  # cards are square
THUMBNAIL = (560, 560)
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.CanvasMenu": False,
    "Comfy.VueNodes.Enabled": False,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
EXPORT = """() => app.graphToPrompt().then(made =>
    [made.workflow, made.output].map(each => JSON.stringify(each, null, 2)))"""
FOCUS = """() => {  // a square as high as the graph, with our node in its middle
    const groups = app.graph.groups.map(group => group._bounding);
    const left = Math.min(...groups.map(f => f[0])), top = Math.min(...groups.map(f => f[1]));
    const right = Math.max(...groups.map(f => f[0] + f[2]));
    const side = Math.max(...groups.map(f => f[1] + f[3])) - top + 40;
    const node = app.graph.nodes.find(node => node.type.startsWith("SEGuidance"));
    const middle = node.pos[0] + node.size[0] / 2;
    const view = app.canvas.ds;
    view.scale = innerHeight / side;
    const least = left - 20, most = right + 20 - side;
    view.offset[0] = -Math.max(least, Math.min(most, middle - side / 2));
    view.offset[1] = 20 - top;
    app.canvas.setDirty(true, true);
}"""


def main(names: list[str]) -> int:
    """Save the named workflows, or all."""
    from playwright.sync_api import sync_playwright

    chromium = browser.ensure()
    if chromium is None:
        raise Failure("Saving workflows needs a Chromium: set SEG_CHROMIUM.")
    every = sorted([*FOLDER.glob("*.json"), *BLUEPRINTS.glob("*.json")])
    paths = [path for path in every if path.stem in names or not names]
    documents = {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    with Server(pinned_tree(CURRENT)) as host, sync_playwright() as play:
        (host.base / "user" / "default").mkdir(parents=True, exist_ok=True)
        host.post("/settings", SETTINGS)
        definitions = host.json("/object_info")
        for document in documents.values():
            provide_models(host, document, DEMO_PACK / "weights.safetensors")
            name_packs(document, definitions)
        started = play.chromium.launch(executable_path=chromium, args=list(browser.FLAGS))
        page = started.new_page(viewport=WINDOW)
        page.goto(host.url)
        page.wait_for_function(browser.READY)
        page.wait_for_timeout(3000)
        page.evaluate("() => app.extensionManager.command.execute('Workspace.ToggleFocusMode')")
        for path, document in documents.items():
            _save(page, path, document)
        started.close()
    return 0


def subgraphs(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the subgraphs that a workflow defines."""
    return document.get("definitions", {}).get("subgraphs", [])


def all_nodes(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the nodes of a workflow and of its subgraphs."""
    return [node for graph in (document, *subgraphs(document)) for node in graph["nodes"]]


def provide_models(host: Server, document: dict[str, Any], file: Path) -> None:
    """Place a file under each name that a workflow loads, so that nothing is marked missing."""
    for node in all_nodes(document):
        for model in node["properties"].get("models", []):
            target = host.base / "models" / model["directory"] / model["name"]
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                link_file(file, target)


def name_packs(document: dict[str, Any], definitions: dict[str, Any]) -> None:
    """Say in each node which pack it is from, as the Manager wants to know."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = project.partition('\nversion = "')[2].partition('"')[0]
    named = {graph["id"] for graph in subgraphs(document)}
    for node in all_nodes(document):
        if node["type"] in named:
            continue
        module = definitions.get(node["type"], {}).get("python_module", "")
        ours = module == f"custom_nodes.{PACK_FOLDER}"
        name, release = ("smoothed-energy-guidance", version) if ours else ("comfy-core", CURRENT)
        said = {"Node name for S&R": node["type"], "cnr_id": name, "ver": release}
        node["properties"] = {**said, **node["properties"], **said}


def _save(page: Any, path: Path, document: dict[str, Any]) -> None:
    page.evaluate("document => app.loadGraphData(document)", document)
    page.wait_for_timeout(1500)
    workflow, prompt = page.evaluate(EXPORT)
    saved = json.loads(workflow)
    for graph, source in zip(subgraphs(saved), subgraphs(document), strict=True):
        graph["category"] = source["category"]  # the frontend reads it, but does not save it
    workflow = json.dumps(saved, indent=2, ensure_ascii=False)
    path.write_text(workflow, encoding="utf-8", newline="\n")
    if path.parent == FOLDER:
        (FOLDER / "api" / path.name).write_text(prompt, encoding="utf-8", newline="\n")
        _save_thumbnail(page, path.with_suffix(".jpg"))
    say(f"{path.relative_to(ROOT)}")


def _save_thumbnail(page: Any, path: Path) -> None:
    from PIL import Image

    page.evaluate(FOCUS)
    page.wait_for_timeout(1500)
    picture = Image.open(BytesIO(page.screenshot())).convert("RGB")
    picture = picture.resize(THUMBNAIL, Image.Resampling.LANCZOS)
    picture.save(path, quality=85, optimize=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
