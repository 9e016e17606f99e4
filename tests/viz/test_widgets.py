"""The explorer works without a kernel, is small, and is deterministic."""

import base64
import html.parser
import io
import itertools
import re

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from companion.errors import BadParameter
from companion.viz import widgets
from companion.viz.style import style

CONTROLS = {"layer": [1, 2, 3, 4], "method": ["VPT-Deep", "SA²VP"]}
COLOURS = {key: (40 * key[0], 200 * (key[1] == "SA²VP"), 90) for key in itertools.product(*CONTROLS.values())}


def flat_frames():
    return {key: np.full((30, 40, 3), colour, dtype=np.uint8) for key, colour in COLOURS.items()}


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def picture_of(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def colour_of(uri):
    return picture_of(uri).convert("RGB").getpixel((5, 5))


def test_frames_stand_in_the_order_of_the_controls():
    page = widgets.explorer(flat_frames(), CONTROLS, "Where the class token looks").data
    uris = re.findall(r'"(data:image/png;base64,[^"]+)"', page)
    assert [colour_of(uri) for uri in uris] == list(COLOURS.values())
    (image,) = Page(page).all("img")
    assert image["src"] == uris[0]
    assert image["alt"] == "Where the class token looks: layer 1, method VPT-Deep"


def test_controls_are_native_and_labelled():
    page = Page(widgets.explorer(flat_frames(), CONTROLS, "t").data)
    assert [a["type"] for a in page.all("input")] == ["range"]
    assert page.all("input")[0]["max"] == "3" and len(page.all("option")) == 2 and len(page.all("select")) == 1
    order = [tag for tag, _ in page.tags if tag in ("label", "input", "select")]
    assert order == ["label", "input", "label", "select"]  # each inside its label
    # JupyterLab in command mode handles the arrow keys unless the focused field stops them
    assert all(a["data-lm-suppress-shortcuts"] == "true" for tag in ("input", "select") for a in page.all(tag))


def test_nothing_is_loaded_from_elsewhere():
    page = widgets.explorer(flat_frames(), CONTROLS, "t").data
    assert "http" not in page and "//" not in re.sub(r"base64,[^\"]+", "", page) and "import" not in page
    assert all(a.get("src", "data:").startswith("data:") for _, a in Page(page).tags)


def test_equal_images_give_equal_html_and_other_images_the_same_id():
    one, two = (widgets.explorer(flat_frames(), CONTROLS, "t").data for _ in range(2))
    assert one == two
    darker = widgets.explorer({k: f // 2 for k, f in flat_frames().items()}, CONTROLS, "t").data
    clean = [re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "PNG", page) for page in (one, darker)]
    assert one != darker and clean[0] == clean[1]

    def drawn():
        with style():
            figure, ax = plt.subplots(figsize=(2, 2))
            ax.plot([1, 2])
        return figure

    assert len({widgets.explorer({1: drawn()}, {"step": [1]}).data for _ in range(2)}) == 1
    assert plt.get_fignums() == []  # closed: they would be shown a second time below the cell


def test_text_cannot_break_out():
    bad = "</script><b>&\"'"
    page = widgets.explorer({(bad,): np.zeros((8, 8, 3))}, {bad: [bad]}, bad).data
    assert page.count("</script>") == 1 and Page(page).all("b") == []
    assert Page(page).all("img")[0]["alt"] == f"{bad}: {bad} {bad}"


def test_photographs_fit_and_too_many_are_refused(monkeypatch):
    def size(image):
        return len(widgets.explorer({i: np.roll(image, i, 0) for i in (0, 1)}, {"shift": [0, 1]}).data)

    assert 40_000 < size(skimage.data.astronaut()[::2, ::2]) <= widgets.LIMIT == 300_000
    squares = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    whole = size(squares)
    monkeypatch.setattr(widgets, "LIMIT", whole - 1)
    assert size(squares) < whole  # of fewer colours
    monkeypatch.setattr(widgets, "LIMIT", 5_000)
    with pytest.raises(BadParameter, match=r"2 images, \d+ kB.*at most 5 kB"):
        size(squares)


def test_small_arrays_are_enlarged_and_wrong_ones_refused():
    page = widgets.explorer({0: torch.rand(14, 14, 3)}, {"block": [0]}).data
    assert picture_of(Page(page).all("img")[0]["src"]).size == (224, 224)
    frames, fewer = flat_frames(), flat_frames()
    del fewer[3, "SA²VP"]
    for given, controls, said in (
        ({0: np.zeros((14, 14))}, {"block": [0]}, r"shape \(14, 14\)"),
        (fewer, CONTROLS, r"no image for \(3, 'SA²VP'\)"),
        (frames | {(9, "SA²VP"): np.zeros((8, 8, 3))}, CONTROLS, r"no such values \(9, 'SA²VP'\)"),
        ({}, {}, "controls"),
    ):
        with pytest.raises(BadParameter, match=said):
            widgets.explorer(given, controls)


def test_an_animation_has_a_still_image_for_reduced_motion():
    frames = [np.full((40, 60, 3), 20 * i, np.uint8) for i in range(5)]
    page = widgets.animation(frames, "a <film>", seconds=0.5).data
    image, source = Page(page).all("img")[0], Page(page).all("source")[0]
    film = picture_of(image["src"])
    assert film.n_frames == 5
    film.seek(1)
    film.load()
    assert film.info["timestamp"] == 500 and film.size == (240, 160)
    assert image["alt"] == "a <film>" and "prefers-reduced-motion" in source["media"]
    with pytest.raises(BadParameter, match="at least one"):
        widgets.animation([], "nothing")


def test_an_animation_of_large_images_shrinks_until_it_fits(monkeypatch):
    assert widgets.ANIMATION_LIMIT == 160_000
    monkeypatch.setattr(widgets, "ANIMATION_LIMIT", 40_000)
    noise = np.random.default_rng(0).integers(0, 255, (3, 256, 256, 3), dtype=np.uint8)
    page = widgets.animation(noise, "noise").data
    assert len(page) < 41_000
    film = picture_of(Page(page).all("img")[0]["src"])
    assert film.n_frames == 3 and film.size[0] == film.size[1] < 256
    monkeypatch.setattr(widgets, "ANIMATION_LIMIT", 3_000)
    with pytest.raises(BadParameter, match="at most 3 kB"):
        widgets.animation(noise, "noise")


def test_live_is_an_explorer_outside_jupyterlab(monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    frames = flat_frames()
    shown = widgets.live(lambda layer, method: frames[layer, method], "t", **CONTROLS)
    assert shown.data == widgets.explorer(frames, CONTROLS, "t").data


def test_live_computes_on_demand_in_jupyterlab(monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "notebooks/sa2vp.ipynb")
    calls, shown = [], []
    monkeypatch.setattr(widgets, "display", shown.append)

    def draw(layer, method):
        calls.append((layer, method))
        return flat_frames()[layer, method]

    box = widgets.live(draw, "t", **CONTROLS)
    heading, controls, _ = box.children
    assert heading.value == "t" and calls == [(1, "VPT-Deep")]
    slider, choice = controls.children
    assert isinstance(slider, ipywidgets.SelectionSlider) and isinstance(choice, ipywidgets.Dropdown)
    slider.value = 3
    choice.value = "SA²VP"
    assert calls == [(1, "VPT-Deep"), (3, "VPT-Deep"), (3, "SA²VP")]
    assert Image.open(io.BytesIO(shown[-1].data)).convert("RGB").getpixel((5, 5)) == COLOURS[3, "SA²VP"]


@pytest.mark.browser
def test_keyboard_moves_the_controls(browser):
    # twice the same widget on one page: each keeps its own state
    text = widgets.explorer(flat_frames(), CONTROLS, "t").data
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(error))
    page.set_content(f"<html><body>{text}{text}</body></html>")
    first, second = page.locator("img").all()

    def colours():
        return [colour_of(image.get_attribute("src")) for image in (first, second)]

    start = COLOURS[1, "VPT-Deep"]
    assert colours() == [start, start]
    for key in ("Tab", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    assert colours() == [COLOURS[3, "VPT-Deep"], start]
    assert page.locator("output").first.text_content() == "3"
    assert page.get_by_label("layer").first.get_attribute("aria-valuetext") == "3"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    assert colours() == [COLOURS[3, "SA²VP"], start]
    assert first.get_attribute("alt") == "t: layer 3, method SA²VP"
    page.get_by_label("method").last.select_option("SA²VP")
    assert colours() == [COLOURS[3, "SA²VP"], COLOURS[1, "SA²VP"]]
    assert errors == []
    page.close()


@pytest.mark.browser
def test_without_scripts_the_first_image_is_shown_alone(browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.set_content(widgets.explorer(flat_frames(), CONTROLS, "t").data)
    assert page.locator("img").is_visible() and not page.locator("select").is_visible()
    assert "only the first image" in page.locator("noscript").inner_text()
    context.close()


@pytest.mark.browser
@pytest.mark.parametrize(("ink", "paper"), [("rgb(230, 230, 230)", "rgb(20, 20, 20)"), ("rgb(20, 20, 20)", "white")])
def test_text_takes_the_colour_of_the_theme(browser, ink, paper):
    page, text = browser.new_page(), widgets.explorer(flat_frames(), CONTROLS, "t").data
    page.set_content(f'<body style="color: {ink}; background: {paper}">{text}')
    for place in ("p", "label", "output", "select"):
        assert page.locator(place).first.evaluate("e => getComputedStyle(e).color") == ink
    assert page.locator("select").evaluate("e => getComputedStyle(e).backgroundColor") == "rgba(0, 0, 0, 0)"
    page.close()
