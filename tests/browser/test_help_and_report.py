"""What a person sees of help, report and templates, in the real frontend."""

from __future__ import annotations

import io
import json

import pytest
from choice import some
from frontend import EMPTY, ROOT, WORKFLOWS, keep_picture, open_workflow
from PIL import Image

from dev import browser
from dev.help_pictures import report_graph
from dev.host import Server
from dev.places import PACK_FOLDER

NODES = json.loads((ROOT / "tests" / "goldens" / "node_inputs.json").read_text(encoding="utf-8"))
LANGUAGES = ("en", "zh", "ja", "ko")


def speak(host: Server, page, language: str) -> None:
    """Set the frontend's language, as its settings do."""
    host.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Locale": language})
    page.reload()
    page.wait_for_function(browser.READY, timeout=120_000)


def heading(node: str, language: str) -> str:
    place = f"{node}.md" if language == "en" else f"{node}/{language}.md"
    return (ROOT / "web" / "docs" / place).read_text(encoding="utf-8").splitlines()[0][2:]


def open_help(page, node: str) -> None:
    """Open the help of a node, as the button above a selected node does."""
    page.evaluate(
        """kind => {
            const node = LiteGraph.createNode(kind);
            app.graph.add(node);
            node.pos = [300, 200];
            app.canvas.selectNode(node);
        }""",
        node,
    )
    page.wait_for_timeout(500)
    page.get_by_test_id("info-button").or_(page.locator("[data-testid=info-button]")).first.click()


@pytest.mark.parametrize("language", some(LANGUAGES, "ja"))
def test_help_opens_in_each_language(host, page, language):
    speak(host, page, language)
    open_workflow(page, EMPTY)
    node = "SEGuidance"
    open_help(page, node)
    shown = page.get_by_role("heading", name=heading(node, language), exact=True).first
    shown.wait_for()
    pictures = page.locator("img[src*='/docs/pictures/']")
    pictures.first.wait_for()
    page.wait_for_timeout(1500)
    widths = pictures.evaluate_all("all => all.map(one => one.naturalWidth)")
    keep_picture(page, f"help {language}")
    assert widths
    assert all(width > 100 for width in widths)


@pytest.mark.parametrize("rendering", ["classic", "Nodes 2.0"], indirect=True)
def test_the_report_appears_on_the_node_after_a_run(host, page, rendering):
    graph = {key: {**node, "_meta": {"title": key}} for key, node in report_graph().items()}
    page.evaluate("graph => app.loadApiJson(graph, 'report')", graph)
    page.wait_for_timeout(1500)
    page.evaluate("() => app.queuePrompt(0)")
    page.wait_for_function(
        """() => {
            const node = app.graph.nodes.find(one => one.type === "SEGuidanceReport");
            return node?.imgs?.length || Object.values(app.nodeOutputs || {}).some(
                output => output?.images?.length && output?.text);
        }""",
        timeout=120_000,
    )
    page.evaluate(
        """() => {
            const node = app.graph.nodes.find(one => one.type === "SEGuidanceReport");
            for (const other of app.graph.nodes) if (other !== node) other.pos = [3000, 3000];
            node.pos = [500, 100];
            node.size = [420, 860];
            const view = app.canvas.ds;
            view.scale = 1;
            view.offset = [-200, 0];
            app.canvas.setDirty(true, true);
        }"""
    )
    page.wait_for_timeout(2500)
    keep_picture(page, f"report on the node, {rendering}")
    if rendering == "Nodes 2.0":
        preview = page.locator("[data-node-id] img").first
        assert preview.is_visible()
        assert preview.evaluate("image => image.naturalWidth") >= 900
    (found,) = page.evaluate("() => Object.values(app.nodeOutputs).filter(one => one?.text)")
    (image,) = found["images"]
    drawn = Image.open(io.BytesIO(host.image_bytes(image)))
    assert drawn.size[0] >= 900
    assert len(found["text"][0].split("\n")) == 5


def test_templates_show_their_thumbnails(host, page):
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text(PACK_FOLDER).first.click()
    page.wait_for_timeout(1500)
    # A card shows its picture from memory, so the picture is known by its card's title.
    shown = {}
    for name in (path.stem for path in WORKFLOWS):
        title = dialog.get_by_text(name, exact=True).first
        title.scroll_into_view_if_needed()
        title.wait_for()
        page.wait_for_timeout(700)
        shown[name] = title.evaluate(
            """title => {
                for (let card = title; card; card = card.parentElement) {
                    const picture = card.querySelector("img");
                    if (picture) return [picture.naturalWidth, picture.naturalHeight];
                }
            }"""
        )
    keep_picture(page, "templates")
    for name, size in shown.items():
        with Image.open(ROOT / "example_workflows" / f"{name}.jpg") as picture:
            assert size == list(picture.size), name
