"""Readers of images with captions, and errors of broken files."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from companion import data
from companion.data import restoration
from companion.data.restoration import load, own, read_captions
from companion.errors import CorruptFile, MissingData
from companion.io.files import write_json
from tests.data.conftest import expect, refused, unreadable


def picture(path: Path, size: tuple[int, int] = (20, 12), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def test_coco_gives_the_first_caption_by_id(tmp_path: Path, monkeypatch) -> None:
    name = "restoration/coco"
    expect(monkeypatch, name, sizes={"train": 2, "test": 2})
    for split in ("train", "val"):
        images = [{"id": i, "file_name": f"{i}.jpg", "height": 12, "width": 20} for i in (9, 3)]
        said = (7, 9, "a later one"), (5, 9, "A zebra\n on  grass."), (8, 3, "Oranges."), (2, 3, " ")
        captions = [{"id": number, "image_id": i, "caption": text} for number, i, text in said]
        file = tmp_path / "coco" / "annotations" / f"captions_{split}2017.json"
        write_json(file, {"images": images, "annotations": captions})
        for i in (9, 3):
            picture(tmp_path / "coco" / f"{split}2017" / f"{i}.jpg")
    found = load(name, tmp_path, "test")
    assert found.captions == ("Oranges.", "A zebra on grass.")
    assert [Path(path).name for path in found.sources] == ["3.jpg", "9.jpg"]
    image, caption = found[1]
    assert image.shape == (3, 12, 20) and image.dtype == torch.float32 and caption == "A zebra on grass."
    assert image.min() >= 0 and 0.9 < image.max() <= 1 and data.status(name, tmp_path).state == "present"
    ends = {'"../a", "id": 1}], "annotations": []': "../a", '"a", "id": 1}], "annotations": [{}]': "id"}
    contents = {f'{{"images": [{{"file_name": {end}}}': value for end, value in ends.items()}
    contents['{"images": [], "annotations": [{"id": 17, "image_id": 2, "caption": null}]}'] = "17"
    contents |= {"[]": "", '{"images": [], "annotations": []}': ""}
    contents['{"images": [], "annotations": [{"id": 1, "image_id": 2, "caption": ""}]}'] = "2"
    unreadable(file, lambda: read_captions(file), contents)


def test_own(tmp_path: Path) -> None:
    for i, name in enumerate(("a.png", "b.jpg")):
        picture(tmp_path / "images" / name, seed=i)
    assert own(tmp_path)["train"].captions == own(tmp_path / "images")["train"].captions == ("", "")
    listing = tmp_path / "captions.jsonl"
    lines = '\ufeff{"file": "b.jpg", "caption": "a zebra  on grass"}\n\n{"file": "a.png", "caption": ""}\n'
    listing.write_text(lines, encoding="utf-8")
    found = own(tmp_path)["train"]
    assert found.captions == ("a zebra on grass", "") and Path(found.sources[0]).name == "b.jpg"
    bad = "{", "[]", '{"file": "a.png"}', '{"file": 3, "caption": ""}', '{"file": "../a", "caption": ""}', "[" * 10**5
    unreadable(listing, lambda: own(tmp_path), dict.fromkeys(bad, "line 1") | {"": ""})
    twice = "".join(f'{{"file": "{name}", "caption": "x"}}\n' for name in ("a.png", "./a.png"))
    listing.write_text(twice, encoding="utf-8")
    refused(CorruptFile, "a.png", own, tmp_path)
    refused(MissingData, "nowhere", own, tmp_path / "nowhere")


def test_fetch_of_div2k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def download(url: str, root: str, md5: str) -> None:
        fetched.append(url.rpartition("/")[2])
        picture(Path(root) / fetched[-1][:-4] / f"{md5}.png")

    numbers = {"train": (range(1, 2), "0001"), "test": (range(801, 802), "0801")}
    monkeypatch.setattr(restoration, "DIV2K", numbers)
    monkeypatch.setattr(restoration, "download_and_extract_archive", download)
    for _ in range(2):  # what is there is left alone
        assert data.fetch("restoration/div2k", tmp_path, progress=False) == tmp_path / "div2k"
    assert fetched == ["DIV2K_train_HR.zip", "DIV2K_valid_HR.zip"]
    assert load("restoration/div2k", tmp_path, "test").sources[0].endswith("0801.png")
    assert [path.name for path in tmp_path.iterdir()] == ["div2k"]


def test_pairs_of_low_and_high_quality_are_matched_by_their_names(tmp_path: Path) -> None:
    for i, name in enumerate(("b.png", "a.png")):
        picture(tmp_path / "high" / name, (20, 30), i)
        picture(tmp_path / "low" / name, (10, 15), i + 2)
    (tmp_path / "captions.jsonl").write_text('{"file": "b.png", "caption": "a zebra"}\n')
    high, caption, low = own(tmp_path)["train"][0]
    assert (high.shape, caption, low.shape) == ((3, 30, 20), "a zebra", (3, 15, 10))
    (tmp_path / "captions.jsonl").unlink()
    pairs = own(tmp_path)["train"]
    assert [Path(file).name for file in pairs.part([1]).low.sources] == ["b.png"] and len(pairs) == 2
    (tmp_path / "low" / "a.png").rename(tmp_path / "low" / "ax4.png")  # as DIV2K's
    assert [Path(file).name for file in own(tmp_path)["train"].low.sources] == ["ax4.png", "b.png"]
    picture(tmp_path / "low" / "ax2.png")
    refused(CorruptFile, "ax2.png and ax4.png are both of a.png", own, tmp_path)
    for scale in (2, 4):
        (tmp_path / "low" / f"ax{scale}.png").unlink()
    refused(MissingData, r"low/a\.png", own, tmp_path)
    shutil.rmtree(tmp_path / "low")
    refused(MissingData, "pairs need", own, tmp_path)
