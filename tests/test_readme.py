"""Every page's Python runs as pasted, on small models, two steps and generated folders; links lead somewhere."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from companion import backbones
from companion.io.papers import slugs
from tests.conftest import ROOT, fresh
from tests.papers.common import FLOWERS, hooks

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): blocks
    for path in [ROOT / "README.md", *sorted((ROOT / "site" / "docs").rglob("*.md"))]
    if (blocks := re.findall(r"(?ms)^```python\n(.*?)^```$", path.read_text(encoding="utf-8")))
}
OTHERS = {"README.md": FLOWERS, "site/docs/own_data.md": (FLOWERS[0], r"torch.Size\(\[1, 2\]\)")}
"""Of the pages that are no paper's: what makes their folders, and a pattern of what they print."""


build = backbones.build


@functools.wraps(build)  # its name, by which a saved model is built again
def small(name: str, weights: str | Path = "pretrained", **options: Any) -> nn.Module:
    """A small random encoder of the same kind."""
    torch.manual_seed(0)
    if name.startswith("openclip:"):
        vision = {"image_size": 224, "patch_size": 32, "width": 64, "layers": 9, "head_width": 32}
        text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
        return build("openclip:ViT-S-32-alt/", "random", embed_dim=64, vision_cfg=vision, text_cfg=text)
    if name.startswith("resnet"):
        return build("resnet18", "random")
    return build("vit_tiny_patch16_224", "random", depth=6, embed_dim=64, num_heads=2)


def shrink(patch: pytest.MonkeyPatch, slug: str) -> None:
    """Small models under the names of the full-size ones, and two steps of a training."""
    from companion.training import fit

    def two_steps(model: nn.Module, loss: Callable, data: Any, *, epochs: float, batch: int, **options: Any) -> Any:
        batch = min(batch, 4)
        return whole(model, loss, data, epochs=2 * batch / len(data), batch=batch, **options)

    whole = fit.fit
    patch.setattr(fit, "fit", two_steps)
    patch.setattr(backbones, "build", small)
    if slug in slugs() and hasattr(hooks(slug), "small_example"):
        hooks(slug).small_example(patch)


def pasted(page: str, folder: Path) -> tuple[str, str, int]:
    """What the blocks of a page print, one after the other in this process, a pattern of it, and the length of the
    page's data."""
    os.chdir(folder)
    slug, printed = Path(page).stem, io.StringIO()
    make, prediction = hooks(slug).EXAMPLE if slug in slugs() else OTHERS[page]
    make()
    names: dict[str, Any] = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        shrink(patch, slug)
        for block in PAGES[page]:
            exec(compile(block, page, "exec"), names)
    return printed.getvalue(), prediction, len(names.get("data", ()))


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs_as_pasted(page: str, tmp_path: Path) -> None:
    printed, prediction, count = fresh(pasted, page, tmp_path)
    assert re.match(prediction, printed)
    if "classification.own" in "".join(PAGES[page]):  # no image is held back
        assert count == len([*tmp_path.glob("flowers/*/*.jpg")])
    if page.endswith("tip.md"):
        assert Image.open(tmp_path / "new.png").size == Image.open(tmp_path / "old.jpg").size


def test_each_paper_has_a_page() -> None:
    assert PAGES.keys() == {*OTHERS, *(f"site/docs/own_data/{slug}.md" for slug in slugs())}


def test_links_of_the_readme_lead_to_files_and_headings() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", README)
    assert len(links) > 20
    for name, heading in links:
        assert (ROOT / name).is_file(), name
        if heading:
            titles = re.findall(r"(?m)^#+ (.*)$", (ROOT / name).read_text(encoding="utf-8"))
            assert heading in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], heading


@pytest.mark.slow
def test_the_wheel_alone_runs_the_examples(tmp_path: Path) -> None:
    """Unpacked, in front of the checkout on the path."""
    pytest.importorskip("setuptools", "77")
    source, wheel = tmp_path / "source", tmp_path / "wheel"
    shutil.copytree(ROOT / "lib" / "companion", source / "lib" / "companion")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*pip, str(source)], check=True)
    zipfile.ZipFile(*tmp_path.glob("*.whl")).extractall(wheel)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(wheel), os.environ.get("PYTHONPATH", "")])}
    where = [sys.executable, "-c", "import companion; print(companion.__file__)"]
    printed = subprocess.run(where, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert Path(printed).is_relative_to(wheel)
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "as_pasted", __file__]
    subprocess.run(tests, env=environment, cwd=ROOT, check=True)
