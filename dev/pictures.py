"""The pictures of the documentation: `python -m dev.pictures [demo] [thumbnails] [help]`.

`demo` is the README's picture, the output of `dev.py demo` made small. `thumbnails` are what
ComfyUI's template browser shows: each shipped workflow as the frontend draws it. `help` are the
pictures of the nodes' help pages, the icon and the banner.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dev import browser, help_pictures
from dev.comfy_tree import host_tree
from dev.environment import python_command
from dev.host import Server, link_file
from dev.places import DEMO_PACK, PACK_FOLDER, ROOT, made_folder
from dev.say import Failure, say

DEMO = ROOT / "docs" / "demo.png"
WORKFLOWS = ROOT / "example_workflows"
COLOURS = 256
SHRINK = 0.75
WINDOW = {"width": 1400, "height": 1400}  # cards are square
THUMBNAIL = (560, 560)
QUIET = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.CanvasMenu": False,
    "Comfy.VueNodes.Enabled": False,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
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


def demo() -> None:
    """Run the demo and keep its picture in a size that a README can carry."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "demo.png"
        command = python_command(ROOT / "dev.py", "demo", "--out", made)
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise Failure("The demo did not run, so there is no picture.")
        picture = Image.open(made).convert("RGB")
    size = [round(side * SHRINK) for side in picture.size]
    made_folder(DEMO.parent)
    picture.resize(size, Image.Resampling.LANCZOS).quantize(COLOURS, kmeans=1).save(
        DEMO, optimize=True
    )
    say(f"{DEMO}: {DEMO.stat().st_size // 1024} KiB")


def thumbnails() -> None:
    """Draw every shipped workflow in the real frontend."""
    from playwright.sync_api import sync_playwright

    found = browser.ensure()
    if found is None:
        raise Failure("Thumbnails need a Chromium: set SEG_CHROMIUM.")
    with Server(host_tree()) as host, sync_playwright() as play:
        (host.base / "user" / "default").mkdir(parents=True, exist_ok=True)
        host.post("/settings", QUIET)
        chromium = play.chromium.launch(executable_path=str(found), args=list(browser.FLAGS))
        page = chromium.new_page(viewport=WINDOW)
        paths = sorted(WORKFLOWS.glob("*.json"))
        for path in paths:
            _provide_models(host, path)
        page.goto(host.url)
        page.wait_for_function(browser.READY)
        page.wait_for_timeout(3000)
        page.evaluate("() => app.extensionManager.command.execute('Workspace.ToggleFocusMode')")
        for path in paths:
            _thumbnail(host, page, path)
        chromium.close()


def _thumbnail(host: Server, page: Any, path: Path) -> None:
    from PIL import Image

    document = host.json(f"/api/workflow_templates/{PACK_FOLDER}/{quote(path.name)}")
    page.evaluate("document => app.loadGraphData(document)", document)
    page.wait_for_timeout(1500)
    page.evaluate(FOCUS)
    page.wait_for_timeout(1500)
    picture = Image.open(BytesIO(page.screenshot())).convert("RGB")
    picture = picture.resize(THUMBNAIL, Image.Resampling.LANCZOS)
    picture.save(path.with_suffix(".jpg"), quality=85, optimize=True)
    say(f"{path.with_suffix('.jpg')}: {path.with_suffix('.jpg').stat().st_size // 1024} KiB")


def _provide_models(host: Server, path: Path) -> None:
    """Place files under the names that a workflow loads, so that nothing is marked missing."""
    for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
        for model in node["properties"].get("models", []):
            target = host.base / "models" / model["directory"] / model["name"]
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                link_file(DEMO_PACK / "weights.safetensors", target)


def main(arguments: list[str]) -> int:
    """Make the named pictures, or all."""
    makers = {"demo": demo, "thumbnails": thumbnails, "help": help_pictures.make_all}
    for name, make in makers.items():
        if not arguments or name in arguments:
            make()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
