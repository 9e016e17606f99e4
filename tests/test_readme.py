"""The examples on own data run unchanged, on small models, two steps and generated folders; links lead somewhere."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from companion import backbones
from companion.models import bat, ecamp
from companion.training import fit
from tests.small import small_pipe
from tests.test_saving import picture

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "site" / "docs" / "own_data.md").read_text(encoding="utf-8")
IMPORTS = re.search(r"```python\n(.*?)```", PAGE, re.S)[1]
EXAMPLES = dict(re.findall(r"\n## `(\w+)`: .*?```python\n(.*?)```", PAGE, re.S))
EXAMPLES = {slug: IMPORTS + code for slug, code in EXAMPLES.items()}
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


def images(folder: Path, names: list[str], size: tuple[int, int] = (40, 48)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        picture(i, size).save(folder / name)


def flowers() -> None:
    for name in ("rose", "tulip"):
        images(Path("flowers") / name, [f"{i}.jpg" for i in range(26)])
    images(Path(), ["new.jpg"])


def people() -> None:
    images(Path("people"), [f"{i}.jpg" for i in range(16)], (60, 30))
    rows = [f"{i}.jpg,{'train' if i < 15 else 'test'},{i % 2},{i % 3 // 2}" for i in range(16)]
    head = "image,split,a pedestrian with a hat,a pedestrian with a bag"
    Path("people/labels.csv").write_text("\n".join([head, *rows]))
    images(Path(), ["new.jpg"])


def walk() -> None:
    for folder in ("walk", "new"):
        for stream in ("visible", "infrared"):
            images(Path(folder) / stream, [f"{i:02d}.jpg" for i in range(21)], (200, 260))
    np.savetxt("walk/boxes.txt", [[100 + i, 80, 40, 60] for i in range(21)], delimiter=",")
    vit = build("vit_tiny_patch16_224", "random", depth=1, embed_dim=64, num_heads=1)
    torch.save({"net": bat.OSTrack(vit, head_channels=32).to_official()}, "OSTrack_ep0300.pth.tar")


def area() -> None:
    pytest.importorskip("rasterio")
    for i, path in enumerate([*(Path(f"area/images/{i}.tif") for i in range(8)), Path("new.tif")]):
        labels = Path("area/labels") / path.name
        for folder in (path.parent, labels.parent):
            folder.mkdir(parents=True, exist_ok=True)
        image = picture(i, (64, 64) if i % 2 else (80, 100))
        image.save(path)
        Image.fromarray(np.array(image)[..., 0] // 86).save(labels)


def chests() -> None:
    images(Path("chests"), [f"{i}.png" for i in range(16)])
    Path("chests/train_list.txt").write_text("\n".join(f"{i}.png {i % 2} {i % 3 // 2}" for i in range(16)))
    images(Path(), ["new.png"])
    torch.manual_seed(0)
    sizes = {"encoder": ecamp.Blocks(64, 3, 1), "decoder": ecamp.Blocks(64, 1, 1)}
    torch.save(ecamp.build("pocket", image=224, patch=16, **sizes).to_official(), "ECAMP.pth")


def shop() -> None:
    images(Path("shop/images"), [f"{i}.jpg" for i in range(8)])
    found = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 40, "width": 48} for i in range(8)],
        "categories": [{"id": 1, "name": "apple"}, {"id": 2, "name": "kiwi"}, {"id": 3, "name": "pear"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1 + i % 3, "bbox": [5, 5, 30, 30], "area": 900, "iscrowd": 0}
            for i in range(8)
        ],
    }
    Path("shop/annotations.json").write_text(json.dumps(found))
    images(Path(), ["new.jpg"])


def biopsies() -> None:
    for name, grade in [("new", "0"), *((f"slide{i}", "012"[i % 3]) for i in range(8))]:
        slide = Path("biopsies") / grade / f"{name}.tiff"
        slide.parent.mkdir(parents=True, exist_ok=True)
        slide.touch()
        file = Path("new.h5") if name == "new" else Path(f"biopsies/features/{name}.h5")
        file.parent.mkdir(exist_ok=True)
        with h5py.File(file, "w") as features:
            rng = np.random.default_rng(len(name))
            features["features"] = rng.normal(size=(2, 64, 384)).astype("float32")
            features["coords"], features["shares"] = np.zeros((2, 2), int), np.ones((2, 64, 256), "float32")
            features.attrs["settings"] = "{}"
        if name == "new":
            slide.unlink()


def photographs() -> None:
    images(Path("photographs/images"), [f"{i}.jpg" for i in range(4)])
    images(Path(), ["old.jpg"])


FOLDERS: dict[str, tuple[Callable[[], None], str]] = {
    "README": (flowers, r"\[\{'(rose|tulip)': 0\.\d+, "),
    "sa2vp": (flowers, r"\[\{'(rose|tulip)': 0\.\d+, "),
    "dplq": (flowers, r"\[\{'(rose|tulip)': 0\.\d+, "),
    "promptpar": (people, r"\[\{'a pedestrian with a (hat|bag)': 0\.\d+, "),
    "bat": (walk, r"\[\[120"),
    "metasegnet": (area, r"\[tensor\(\[\["),
    "ecamp": (chests, r"\[\{'(effusion|nodule)': 0\.\d+, "),
    "sic_cads": (shop, r"\[\{'(apple|kiwi|pear)': 0\.\d+, "),
    "dmt": (flowers, r"\[\{'(rose|tulip)': 0\.\d+, "),
    "hvit": (biopsies, r"\['(benign|low grade|high grade)'\]"),
    "tip": (photographs, ""),
}


def shrink(patch: pytest.MonkeyPatch, paper: str) -> None:
    """Small models under the names of the full-size ones, and two steps of a training."""

    def two_steps(model: nn.Module, loss: Callable, data: Any, *, epochs: float, batch: int, **options: Any) -> Any:
        batch = min(batch, 4)
        return whole(model, loss, data, epochs=2 * batch / len(data), batch=batch, **options)

    whole = fit.fit
    patch.setattr(fit, "fit", two_steps)
    patch.setattr(backbones, "build", small)
    if paper == "dmt":
        from companion.models import dmt
        from companion.models.dmt import vit

        patch.setitem(vit.SIZES, "tiny", {"width": 48, "depth": 2, "heads": 3})
        patch.setattr(dmt, "released", lambda name: vit.ViT(width=64, depth=1, heads=4))
    elif paper == "metasegnet":
        from companion.models.metasegnet import augmentation, model

        crops_of = augmentation.train_transform
        patch.setattr(augmentation, "train_transform", lambda size, ignore: crops_of(size // 4, ignore=ignore))
        patch.setitem(model.SIZES, "paper", model.SIZES["pocket"])
    elif paper == "sic_cads":
        from companion.models.sic_cads import recipe

        crops = recipe.Crops
        patch.setattr(recipe, "Crops", lambda data, size, crop: crops(data, size // 5, crop))
    elif paper == "tip":
        from companion.models.tip import TIPPipeline, degradations

        degraded = degradations.Degraded
        patch.setattr(degradations, "Degraded", lambda images, size: degraded(images, size // 16))
        patch.setattr(TIPPipeline, "from_stable_diffusion", small_pipe)


@pytest.mark.parametrize("paper", FOLDERS)
def test_an_example_trains_saves_loads_and_predicts(
    paper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert EXAMPLES.keys() == FOLDERS.keys()
    make, prediction = FOLDERS[paper]
    monkeypatch.chdir(tmp_path)
    make()
    shrink(monkeypatch, paper)
    exec(compile(EXAMPLES[paper], f"own_data.md, {paper}", "exec"), {})
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
