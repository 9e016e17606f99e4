"""Controls (sliders, drop-down lists) that work in a live notebook and on a page without a kernel.

`explorer` takes images drawn beforehand and returns plain HTML: the browser's own sliders and lists, a short script,
the images embedded. The same output works in JupyterLab and on the static site and from the keyboard, and shows its
first image where scripts are off. `live` computes each image on demand, by ipywidgets; where no one can move a slider
(papermill, nbval) it draws all of them and returns the explorer.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import HTML, Image, display
from matplotlib.figure import Figure
from PIL import Image as PILImage
from torch import Tensor

from ..errors import BadParameter
from .tables import escape

LIMIT = 300_000  # bytes of one explorer: a notebook with three stays below 1 MB
ANIMATION_LIMIT = 160_000  # bytes of one animation

Frame: TypeAlias = Figure | np.ndarray | Tensor

# every colour is the page's own, so that the widget is readable in dark and light themes; images stay on white
_CSS = """
.companion-explorer { color: inherit; margin: 0.5em 0; }
.companion-explorer .controls:not([hidden]) { display: flex; flex-wrap: wrap; gap: 0.3em 1.5em; margin: 0.4em 0; }
.companion-explorer label { display: inline-flex; align-items: center; gap: 0.5em; color: inherit; }
.companion-explorer input { width: 11em; accent-color: #0072b2; }
.companion-explorer output { min-width: 3em; font-variant-numeric: tabular-nums; }
.companion-explorer select { color: inherit; background: transparent; border: 1px solid currentColor;
  border-radius: 3px; padding: 0.15em 0.3em; font: inherit; }
.companion-explorer option { color: #000; background: #fff; }
.companion-explorer :focus-visible { outline: 2px solid #56b4e9; outline-offset: 2px; }
.companion-explorer img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
"""

_SCRIPT = """
(() => {
  const id = %(id)s, names = %(names)s, values = %(values)s, frames = %(frames)s, title = %(title)s;
  const root = document.currentScript?.closest(".companion-explorer")
    ?? document.querySelector(`[data-explorer="${id}"]:not([data-ready])`);
  root.dataset.ready = "yes";
  const image = root.querySelector("img"), inputs = [...root.querySelectorAll("input, select")];
  frames[0] = image.src;
  const show = () => {
    let index = 0;
    const labels = inputs.map((input, i) => {
      const at = Number(input.value), value = values[i][at];
      index = index * values[i].length + at;
      if (input.type === "range") {
        input.setAttribute("aria-valuetext", value);
        input.nextElementSibling.textContent = value;
      }
      return `${names[i]} ${value}`;
    });
    image.src = frames[index];
    image.alt = title + labels.join(", ");
  };
  inputs.forEach((input) => input.addEventListener("input", show));
  root.querySelector(".controls").hidden = false;
  show();
})();
"""


def explorer(frames: Sequence[Frame], controls: Mapping[str, Sequence[Any]], title: str = "") -> HTML:
    """Images with a control for each parameter that varies, as HTML that needs no kernel.

    Numbers get a slider, anything else a drop-down list. The HTML depends on the arguments alone, so that equal images
    give equal outputs.

    Args:
        frames: an image for every combination of values, the last control varying fastest: a matplotlib figure, which
            is closed, or an array (H, W, 3) of bytes or of floats in 0 to 1; small ones are enlarged with square
            pixels.
        controls: the name of each control and its values; the first ones are shown first.
        title: shown above the image.

    Raises `BadParameter`: another number of images, or more than 300 kB in all, even with 64 colours an image and a
    quarter of the side.
    """
    if len(frames) != math.prod(map(len, controls.values())):
        raise BadParameter("frames", f"{len(frames)} images", "one for each combination of the controls' values")
    images = [_image(frame) for frame in frames]
    for colours, shrink in ((256, 1), (128, 1), (64, 1), (64, 2), (64, 4)):
        page = _page([_uri(image.reduce(shrink), colours) for image in images], controls, title)
        if len(page) <= LIMIT:
            return HTML(page)
    raise BadParameter(
        "frames",
        f"{len(images)} images, {len(page) / 1000:.0f} kB",
        f"at most {LIMIT // 1000} kB in all: fewer or smaller images, or figures at a lower dpi",
    )


def animation(frames: Sequence[Frame], title: str, seconds: float = 0.25) -> HTML:
    """An animated image as HTML that needs no kernel; a still one for readers who prefer reduced motion.

    Args:
        frames: images of one size, as in `explorer`.
        title: shown above it, and its alternative text.
        seconds: duration of each frame.

    Raises `BadParameter`: no frames, or more than 160 kB even small and at a low quality.
    """
    if not len(frames):
        raise BadParameter("frames", "none", "at least one image")
    given = [_image(frame) for frame in frames]
    # a loss of quality first; photographs must shrink too
    for shrink, quality in [(1, 80), (1, 60), (1, 40), (1, 25), (2, 40), (2, 25), (4, 40), (4, 25)]:
        images = [image.reduce(shrink) for image in given] if shrink > 1 else given
        file = io.BytesIO()
        options = {"quality": quality, "method": 6, "duration": round(1000 * seconds), "loop": 0}
        images[0].save(file, "webp", save_all=True, append_images=images[1:], **options)
        moving, still = base64.b64encode(file.getvalue()).decode(), _uri(images[0], 256)
        if len(moving) + len(still) <= ANIMATION_LIMIT:
            label = escape(title)
            return HTML(
                f'<figure style="margin: 0.5em 0"><figcaption><strong>{label}</strong></figcaption>\n<picture>'
                f'<source media="(prefers-reduced-motion: reduce)" srcset="{still}">'
                f'<img class="dark-light" style="max-width: 100%; height: auto" alt="{label}" '
                f'src="data:image/webp;base64,{moving}"></picture></figure>'
            )
    raise BadParameter("frames", f"{len(moving) / 1000:.0f} kB", f"at most {ANIMATION_LIMIT // 1000} kB: fewer images")


def live(function: Callable[..., Frame], title: str = "", **choices: Sequence[Any]) -> HTML | ipywidgets.VBox:
    """A control for each argument of `function`, which draws an image (as in `explorer`).

    In a kernel that JupyterLab started, the image is computed when a control is changed. Elsewhere (papermill, nbval, a
    script) every combination is drawn at once, and the result is an `explorer`.
    """
    # the server sets this for the kernels of its notebooks; nbclient, which papermill and nbval use, does not
    if "JPY_SESSION_NAME" not in os.environ:
        combinations = itertools.product(*choices.values())
        return explorer([function(**dict(zip(choices, key, strict=True))) for key in combinations], choices, title)
    controls = {name: _widget(name, values) for name, values in choices.items()}

    def show(**values: Any) -> None:
        file = io.BytesIO()
        _image(function(**values)).save(file, "png")
        display(Image(file.getvalue()))

    heading = [ipywidgets.Label(title)] if title else []
    row = ipywidgets.HBox(list(controls.values()), layout={"flex_flow": "row wrap"})
    return ipywidgets.VBox([*heading, row, ipywidgets.interactive_output(show, controls)])


def _is_scale(values: Sequence[Any]) -> bool:
    return len(values) > 2 and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def _widget(name: str, values: Sequence[Any]) -> ipywidgets.Widget:
    """A slider or a drop-down list of ipywidgets."""
    kind = ipywidgets.SelectionSlider if _is_scale(values) else ipywidgets.Dropdown
    return kind(
        options=[(str(value), value) for value in values], description=name, style={"description_width": "auto"}
    )


def _image(frame: Frame) -> PILImage.Image:
    """The frame as an RGB image. A figure is closed, so that it is not shown a second time below the cell."""
    if isinstance(frame, Figure):
        file = io.BytesIO()
        frame.savefig(file, format="png", dpi=frame.dpi, facecolor="white")
        plt.close(frame)
        return PILImage.open(file).convert("RGB")
    array = frame.detach().cpu().numpy() if isinstance(frame, torch.Tensor) else np.asarray(frame)
    if array.ndim != 3 or array.shape[2] != 3:
        raise BadParameter("frames", f"an array of shape {array.shape}", "a matplotlib figure or an array (H, W, 3)")
    if array.dtype != np.uint8:
        array = (np.clip(array, 0, 1) * 255).round().astype(np.uint8)
    image = PILImage.fromarray(array)
    factor = math.ceil(224 / max(image.size)) if max(image.size) < 112 else 1
    return image.resize((image.width * factor, image.height * factor), PILImage.Resampling.NEAREST)


def _uri(image: PILImage.Image, colours: int) -> str:
    """The image as a data URI: PNG of few colours (lines, flat areas) or WebP (photographs), whichever is smaller."""
    png, webp = io.BytesIO(), io.BytesIO()
    image.quantize(colours, dither=PILImage.Dither.NONE).save(png, "png", optimize=True)
    image.save(webp, "webp", quality=85, method=6)
    kind, file = min(("png", png), ("webp", webp), key=lambda pair: len(pair[1].getvalue()))
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()


def _control(name: str, values: Sequence[Any]) -> str:
    """The HTML of one control: a slider for numbers, else a drop-down list."""
    labels = [escape(str(value)) for value in values]
    # without the first attribute JupyterLab takes the arrow keys for itself; without the second a browser that reloads
    # the page restores the control's value, and not the image
    common = 'data-lm-suppress-shortcuts="true" autocomplete="off"'
    if _is_scale(values):
        field = (
            f'<input type="range" min="0" max="{len(values) - 1}" step="1" value="0" aria-valuetext="{labels[0]}" '
            f"{common}><output>{labels[0]}</output>"
        )
    else:
        options = "".join(f'<option value="{i}">{value}</option>' for i, value in enumerate(labels))
        field = f"<select {common}>{options}</select>"
    return f"<label>{escape(name)} {field}</label>"


def _page(uris: Sequence[str], controls: Mapping[str, Sequence[Any]], title: str) -> str:
    values = [[str(value) for value in some] for some in controls.values()]
    named = json.dumps([title, list(controls), values])
    parts: dict[str, Any] = {
        # of the controls, not of the images, which may vary in a bit between machines
        "id": hashlib.sha256(named.encode()).hexdigest()[:12],
        "names": list(controls),
        "values": values,
        "frames": ["", *uris[1:]],  # the first one is in the page already
        "title": f"{title}: " if title else "",
    }
    # "</script>" in a title must not end the script
    script = _SCRIPT % {name: json.dumps(part).replace("<", "\\u003c") for name, part in parts.items()}
    first = ", ".join(f"{name} {some[0]}" for name, some in zip(controls, values, strict=True))
    heading = f"<p><strong>{escape(title)}</strong></p>" if title else ""
    fields = "".join(_control(*item) for item in controls.items())
    # hidden until the script runs: controls without effect would mislead. `dark-light` keeps the site's dark theme from
    # dimming the image
    return f"""<div class="companion-explorer" data-explorer="{parts["id"]}">
<style>{_CSS}</style>
{heading}<div class="controls" hidden>{fields}</div>
<img class="dark-light" src="{uris[0]}" alt="{escape(parts["title"] + first)}">
<noscript><p>With scripts switched off only the first image is shown ({escape(first)}).</p></noscript>
<script>{script}</script>
</div>"""
