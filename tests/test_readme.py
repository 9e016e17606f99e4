"""The examples on own data run unchanged, on small models, two steps and generated folders; links lead somewhere."""

from __future__ import annotations

import functools
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
from companion.training import fit
from tests.papers.common import FLOWERS, hooks, of_all

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "site" / "docs" / "own_data.md").read_text(encoding="utf-8")
IMPORTS = re.search(r"```python\n(.*?)```", PAGE, re.S)[1]
EXAMPLES = {
    path.stem: IMPORTS + "".join(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S)[:1])
    for path in (ROOT / "site" / "docs" / "own_data").glob("*.md")
}
EXAMPLES["README"] = re.search(r"```python\n(.*?)```", README, re.S)[1]


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


FOLDERS = {"README": FLOWERS, **of_all("EXAMPLE")}


def shrink(patch: pytest.MonkeyPatch, slug: str) -> None:
    """Small models under the names of the full-size ones, and two steps of a training."""

    def two_steps(model: nn.Module, loss: Callable, data: Any, *, epochs: float, batch: int, **options: Any) -> Any:
        batch = min(batch, 4)
        return whole(model, loss, data, epochs=2 * batch / len(data), batch=batch, **options)

    whole = fit.fit
    patch.setattr(fit, "fit", two_steps)
    patch.setattr(backbones, "build", small)
    if slug in slugs() and hasattr(hooks(slug), "small_example"):
        hooks(slug).small_example(patch)


@pytest.mark.parametrize("paper", FOLDERS)
def test_an_example_trains_saves_loads_and_predicts(
    paper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert EXAMPLES.keys() == FOLDERS.keys()
    make, prediction = FOLDERS[paper]
    monkeypatch.chdir(tmp_path)
    make()
    shrink(monkeypatch, paper)
    exec(compile(EXAMPLES[paper], f"own_data/{paper}.md", "exec"), {})
    assert re.match(prediction, capsys.readouterr().out)
    if paper == "tip":
        assert Image.open("new.png").size == Image.open("old.jpg").size


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
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "an_example", __file__]
    subprocess.run(tests, env=environment, cwd=ROOT, check=True)
