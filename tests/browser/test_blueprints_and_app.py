"""Subgraph blueprints and the app: found, opened, filled in and run, as a person does it."""

from __future__ import annotations

import io
import json

import pytest
from frontend import EMPTY, ROOT, WORKFLOWS, keep_picture, open_search, open_workflow
from PIL import Image

BLUEPRINTS = sorted(path.stem for path in (ROOT / "subgraphs").glob("*.json"))
APP = next(path for path in WORKFLOWS if path.stem.endswith("app"))
SIZE = 32
SOURCES = """([name, settings]) => {  // give the blueprint what it asks for, and show its result
    const sub = app.graph.nodes.find(node => node.title === name);
    const add = (kind, values = {}) => {
        const node = LiteGraph.createNode(kind);
        app.graph.add(node);
        for (const [key, value] of Object.entries(values))
            node.widgets.find(widget => widget.name === key).value = value;
        return node;
    };
    const text = add("SEGDemoPrompt", {prompt: "nothing"});
    const given = {
        model: add("SEGDemoModelLoader"), positive: text, negative: text,
        latent_image: add("EmptyLatentImage", {width: settings.size, height: settings.size}),
        vae: add("SEGDemoVAE", {scale: 1}), samples: null, images: null,
    };
    const connect = (from, to, name) => from.connect(0, to, to.inputs.findIndex(
        input => input.name === name));
    const feed = node => {
        for (const input of node.inputs)
            if (given[input.name] && input.link === null)
                connect(given[input.name], node, input.name);
        return node;
    };
    for (const [key, value] of Object.entries(settings))
        for (const widget of sub.widgets) if (widget.name === key) widget.value = value;
    let last = feed(sub);
    if (sub.outputs[0].type === "MODEL") {
        given.model = sub;
        given.samples = feed(add("KSampler", {steps: 2, cfg: 1}));
        last = feed(add("VAEDecode"));
    }
    given.images = last;
    feed(add("SaveImage"));
}"""


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_a_blueprint_is_found_by_searching_and_runs(page, host, name):
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    open_workflow(page, EMPTY)
    open_search(page).fill(name)
    page.get_by_role("dialog").get_by_text("Blueprint", exact=True).first.wait_for()
    page.wait_for_timeout(500)
    keep_picture(page, f"search {name}")
    page.keyboard.press("Enter")
    page.mouse.click(700, 400)
    page.wait_for_function("name => app.graph.nodes.some(node => node.title === name)", arg=name)
    page.evaluate(SOURCES, [name, {"scale": 0.25, "steps": 2, "cfg": 1.0, "size": SIZE}])
    page.wait_for_timeout(1000)
    keep_picture(page, name)
    prompt = page.evaluate("() => app.graphToPrompt().then(made => made.output)")
    (guidance,) = [node for node in prompt.values() if node["class_type"] == "SEGuidance"]
    assert guidance["inputs"]["scale"] == 0.25
    (image,) = next(iter(host.run(prompt).values()))["images"]
    width, height = Image.open(io.BytesIO(host.image_bytes(image))).size
    assert height == SIZE
    assert width == SIZE or width > 2 * SIZE  # two, side by side, with a gap
    assert problems == []


def test_the_app_opens_as_one_and_shows_the_picture_it_makes(page, host):
    workflow = json.loads(APP.read_text(encoding="utf-8"))
    made = next((host.base / "models" / "checkpoints").iterdir()).name
    for node in workflow["nodes"]:  # a small picture by the model at hand
        if node["type"] == "CheckpointLoaderSimple":
            node["widgets_values"] = [made]
            del node["properties"]["models"]
        elif node["type"] == "EmptyLatentImage":
            node["widgets_values"] = [64, 64, 1]
        elif node["type"] == "KSampler":
            node["widgets_values"][2] = 2
    open_workflow(page, workflow)
    shown = page.get_by_test_id("app-mode-widget-item")
    labels = [item.inner_text().split("\n")[0] for item in shown.all()]
    assert labels == ["prompt", "scale", "infinite_blur", "blur_sigma", "seed"]
    keep_picture(page, "app")
    page.get_by_test_id("linear-run-button").get_by_role("button", name="Run").click()
    picture = page.get_by_test_id("linear-center-panel").locator("img[src*='filename=SEG']")
    picture.first.wait_for()
    page.get_by_text("Cancel this run").wait_for(state="hidden")
    page.wait_for_timeout(1000)
    assert picture.first.evaluate("image => image.naturalWidth") == 64
    keep_picture(page, "app with its picture")
