"""What a person sees of help, report and templates, in the real frontend."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from dev import browser
from dev.comfy_tree import host_tree
from dev.host import Server
from dev.places import PACK_FOLDER

ROOT = Path(__file__).resolve().parents[2]
NODES = json.loads((ROOT / "tests" / "goldens" / "node_inputs.json").read_text(encoding="utf-8"))
TEMPLATES = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
LANGUAGES = ("en", "zh", "ja", "ko")
PICTURES = ROOT / ".artifacts" / "browser"
EMPTY = {"last_node_id": 0, "last_link_id": 0, "nodes": [], "links": [], "version": 0.4}


def keep_picture(page, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(PICTURES / f"{name}.png"))


def open_workflow(page, workflow: dict) -> None:
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.wait_for_timeout(1500)


@pytest.fixture(scope="module")
def demo_host() -> Iterator[Server]:
    """A server with the demo model, which draws in seconds."""
    with Server(host_tree(), demo=True) as server:
        (server.base / "user" / "default").mkdir(parents=True, exist_ok=True)
        server.post("/settings", {"Comfy.TutorialCompleted": True})
        yield server


@pytest.fixture
def demo_page(chromium, demo_host):
    """A page of that server."""
    context = chromium.new_context(viewport={"width": 1600, "height": 1100})
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(demo_host.url)
    page.wait_for_function(browser.READY, timeout=120_000)
    yield page
    context.close()


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


@pytest.mark.parametrize("language", LANGUAGES)
def test_help_opens_in_each_language(demo_host, demo_page, language):
    speak(demo_host, demo_page, language)
    open_workflow(demo_page, EMPTY)
    node = "SEGuidance"
    open_help(demo_page, node)
    shown = demo_page.get_by_role("heading", name=heading(node, language), exact=True).first
    shown.wait_for()
    pictures = demo_page.locator("img[src*='/docs/pictures/']")
    pictures.first.wait_for()
    demo_page.wait_for_timeout(1500)
    widths = pictures.evaluate_all("all => all.map(one => one.naturalWidth)")
    keep_picture(demo_page, f"help {language}")
    assert widths
    assert all(width > 100 for width in widths)


def test_the_report_appears_on_the_node_after_a_run(demo_host, demo_page):
    speak(demo_host, demo_page, "en")
    demo_page.evaluate("graph => app.loadApiJson(graph, 'report')", report_graph())
    demo_page.wait_for_timeout(1500)
    demo_page.evaluate("() => app.queuePrompt(0)")
    demo_page.wait_for_function(
        """() => {
            const node = app.graph.nodes.find(one => one.type === "SEGuidanceReport");
            return node?.imgs?.length || Object.values(app.nodeOutputs || {}).some(
                output => output?.images?.length && output?.text);
        }""",
        timeout=120_000,
    )
    demo_page.evaluate(
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
    demo_page.wait_for_timeout(2500)
    keep_picture(demo_page, "report on the node")
    (found,) = demo_page.evaluate("() => Object.values(app.nodeOutputs).filter(one => one?.text)")
    (image,) = found["images"]
    drawn = Image.open(io.BytesIO(demo_host.image_bytes(image)))
    assert drawn.size[0] >= 900
    assert len(found["text"][0].split("\n")) == 5


def report_graph() -> dict:
    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}

    return {
        "1": node("SEGDemoModelLoader"),
        "2": node("SEGDemoPrompt", prompt="blue"),
        "3": node("SEGDemoPrompt", prompt="nothing"),
        "4": node("SEGDemoEmptyLatent", width=32, height=32, batch_size=1),
        "5": node(
            "SEGuidance",
            model=["1", 0],
            scale=3.0,
            infinite_blur=False,
            blur_sigma=1.0,
            start_percent=0.0,
            end_percent=0.8,
        ),
        "6": node("SEGuidanceProbe", model=["5", 0]),
        "7": node(
            "KSampler",
            model=["6", 0],
            positive=["2", 0],
            negative=["3", 0],
            latent_image=["4", 0],
            seed=1,
            steps=12,
            cfg=4.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "8": node("SEGDemoDecode", samples=["7", 0], scale=8, method="bicubic"),
        "9": node("SEGuidanceReport", probe=["6", 1], latent=["7", 0], image=["8", 0]),
    }


def test_templates_show_their_thumbnails(demo_host, demo_page):
    speak(demo_host, demo_page, "en")
    demo_page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = demo_page.get_by_role("dialog")
    dialog.get_by_text(PACK_FOLDER).first.click()
    demo_page.wait_for_timeout(1500)
    # A card shows its picture from memory, so the picture is known by its card's title.
    shown = {}
    for name in TEMPLATES:
        title = dialog.get_by_text(name, exact=True).first
        title.scroll_into_view_if_needed()
        title.wait_for()
        demo_page.wait_for_timeout(700)
        shown[name] = title.evaluate(
            """title => {
                for (let card = title; card; card = card.parentElement) {
                    const picture = card.querySelector("img");
                    if (picture) return [picture.naturalWidth, picture.naturalHeight];
                }
            }"""
        )
    keep_picture(demo_page, "templates")
    for name, size in shown.items():
        with Image.open(ROOT / "example_workflows" / f"{name}.jpg") as picture:
            assert size == list(picture.size), name
