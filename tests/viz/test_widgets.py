"""The explorer works without a kernel, is small, and is deterministic."""

import base64
import html
import io
import itertools
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from companion.errors import BadParameter
from companion.viz import widgets
from tests.models.common import refuses

CONTROLS = {"layer": [1, 2, 3, 4], "method": ["VPT-Deep", "SA²VP"]}
COLOURS = {key: (40 * key[0], 200 * (key[1] == "SA²VP"), 90) for key in itertools.product(*CONTROLS.values())}
FRAMES = [np.full((30, 40, 3), colour, dtype=np.uint8) for colour in COLOURS.values()]


def images_of(page):
    """The images that are embedded in a page, in its order."""
    uris = re.findall(r"data:image/\w+;base64,([A-Za-z0-9+/=]+)", page)
    return [Image.open(io.BytesIO(base64.b64decode(uri))) for uri in uris]


def colour_of(image):
    return image.convert("RGB").getpixel((5, 5))


def test_images_are_in_the_order_of_the_controls_and_nothing_is_loaded():
    page = widgets.explorer(FRAMES, CONTROLS, "Where [CLS] looks").data
    assert [colour_of(image) for image in images_of(page)] == list(COLOURS.values())
    assert 'alt="Where [CLS] looks: layer 1, method VPT-Deep"' in html.unescape(page)
    assert (page.count("<input"), page.count("<select"), page.count("<option")) == (1, 1, 2) and 'max="3"' in page
    assert "http" not in page and "//" not in re.sub(r"base64,[^\"]+", "", page)
    (small,) = images_of(widgets.explorer([torch.rand(14, 14, 3)], {"block": [0]}).data)
    assert small.size == (224, 224)


def test_equal_images_give_equal_html_and_figures_are_closed():
    one, two = (widgets.explorer(FRAMES, CONTROLS, "t").data for _ in range(2))
    darker = widgets.explorer([frame // 2 for frame in FRAMES], CONTROLS, "t").data
    assert one == two != darker
    assert len({re.sub('base64,[^"]+', "", page) for page in (one, darker)}) == 1  # the id too
    figure, ax = plt.subplots(figsize=(2, 2))
    ax.plot([1, 2])
    widgets.explorer([figure], {"step": [1]})
    assert plt.get_fignums() == []  # it would be shown a second time below the cell


def test_text_cannot_break_out():
    bad = "</script><b>&\"'"
    page = widgets.explorer([np.zeros((8, 8, 3))], {bad: [bad]}, bad).data
    assert page.count("</script>") == 1 and "<b>" not in page


def test_images_lose_colours_then_size_until_they_fit(monkeypatch):
    large = np.random.default_rng(0).integers(0, 255, (24, 128, 384, 3), dtype=np.uint8)
    assert len(widgets.explorer(large, {"step": range(24)}).data) <= widgets.LIMIT
    monkeypatch.setattr(widgets, "LIMIT", 5_000)
    refuses(
        (lambda: widgets.explorer(large[:2], {"step": range(2)}), "5 kB"),
        (lambda: widgets.explorer([np.zeros((14, 14))], {"block": [0]}), r"\(14, 14\)"),
        (lambda: widgets.explorer(FRAMES[1:], CONTROLS), "7 images"),
    )


def test_an_animation_has_a_still_image_and_shrinks_until_it_fits(monkeypatch):
    frames = [np.full((40, 60, 3), 20 * i, np.uint8) for i in range(5)]
    page = widgets.animation(frames, "a <film>", seconds=0.5).data
    still, film = images_of(page)
    assert film.n_frames == 5 and still.n_frames == 1 and "prefers-reduced-motion" in page and "<film>" not in page
    film.seek(1)
    film.load()
    assert film.info["timestamp"] == 500 and film.size == (240, 160)
    noise = np.random.default_rng(0).integers(0, 255, (2, 128, 128, 3), dtype=np.uint8)
    monkeypatch.setattr(widgets, "ANIMATION_LIMIT", 15_000)
    page = widgets.animation(noise, "noise").data
    assert len(page) < 16_000 and images_of(page)[1].n_frames == 2
    monkeypatch.setattr(widgets, "ANIMATION_LIMIT", 100)
    with pytest.raises(BadParameter):
        widgets.animation(frames, "too large")


def test_live_draws_all_at_once_outside_jupyterlab_and_on_demand_inside(monkeypatch):
    calls, shown = [], []

    def draw(layer, method):
        calls.append((layer, method))
        return FRAMES[[*COLOURS].index((layer, method))]

    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert widgets.live(draw, "t", **CONTROLS).data == widgets.explorer(FRAMES, CONTROLS, "t").data
    assert calls == list(COLOURS)
    monkeypatch.setenv("JPY_SESSION_NAME", "notebooks/sa2vp.ipynb")
    monkeypatch.setattr(widgets, "display", shown.append)
    calls.clear()
    slider, choice = widgets.live(draw, "t", **CONTROLS).children[1].children
    slider.value, choice.value = 3, "SA²VP"
    assert calls == [(1, "VPT-Deep"), (3, "VPT-Deep"), (3, "SA²VP")]
    assert colour_of(Image.open(io.BytesIO(shown[-1].data))) == COLOURS[3, "SA²VP"]


@pytest.mark.browser
def test_the_keyboard_moves_the_controls_of_one_explorer(browser):
    # twice the same on one page: each has its own state
    text = widgets.explorer(FRAMES, CONTROLS, "t").data
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(error))
    page.set_content(f"<html><body>{text}{text}</body></html>")
    first, second = page.locator("img").all()

    def colours():
        return [colour_of(images_of(image.get_attribute("src"))[0]) for image in (first, second)]

    start = COLOURS[1, "VPT-Deep"]
    assert colours() == [start, start]
    for keys, expected in (
        (("Tab", "ArrowRight", "ArrowRight"), (3, "VPT-Deep")),
        (("Tab", "ArrowDown"), (3, "SA²VP")),
    ):
        for key in keys:
            page.keyboard.press(key)
        assert colours() == [COLOURS[expected], start]
    assert page.get_by_label("layer").first.get_attribute("aria-valuetext") == "3"
    assert first.get_attribute("alt") == "t: layer 3, method SA²VP" and errors == []
    page.close()
