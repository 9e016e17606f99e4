"""Readers of images with captions, the degraded samples, and errors of broken files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from companion import data
from companion.data import restoration
from companion.data.degradations import BLIND, Recipe, degrade, parse
from companion.data.restoration import TASKS, TEXTS, Captioned, Degraded, load, own_folder, read_captions, texts
from companion.errors import BadParameter, MissingData
from companion.ops.files import write_json
from companion.training import fit
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
        said = (7, 9, "a later one"), (5, 9, "A zebra\n on  grass."), (8, 3, "Oranges.")
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
    (tmp_path / "coco" / "val2017" / "3.jpg").unlink()
    assert data.status(name, tmp_path).state == "incomplete"
    refused(MissingData, r"3\.jpg", load, name, tmp_path, "test")
    expect(monkeypatch, name, sizes={"train": 2, "test": 5000})
    refused(MissingData, "2 images, 5,000", load, name, tmp_path, "test")
    refused(BadParameter, "val", load, name, tmp_path, "val")
    ends = '"../a", "id": 1}]', '"a", "id": "1"}]', '"a", "id": 1}], "annotations": [{}]'
    bad = [end if "annotations" in end else f'{end}, "annotations": []' for end in ends]
    contents = {f'{{"images": [{{"file_name": {end}}}': "[0]" for end in bad}
    contents |= {"[]": "", '{"images": [], "annotations": []}': ""}
    contents['{"images": [], "annotations": [{"id": 1, "image_id": 2, "caption": ""}]}'] = "2"
    unreadable(file, lambda: read_captions(file), contents)


def test_own_folder(tmp_path: Path) -> None:
    for i, name in enumerate(("a.png", "b.jpg")):
        picture(tmp_path / "images" / name, seed=i)
    assert own_folder(tmp_path).captions == own_folder(tmp_path / "images").captions == ("", "")
    (tmp_path / "images" / "._a.png").write_text("hidden")
    (tmp_path / "images" / "c.gif").write_bytes((tmp_path / "images" / "a.png").read_bytes())
    assert [Path(file).name for file in own_folder(tmp_path / "images").sources] == ["a.png", "b.jpg", "c.gif"]
    listing = tmp_path / "captions.jsonl"
    lines = '\ufeff{"file": "b.jpg", "caption": "a zebra  on grass"}\n\n{"file": "a.png", "caption": ""}\n'
    listing.write_text(lines, encoding="utf-8")
    found = own_folder(tmp_path)
    assert found.captions == ("a zebra on grass", "") and Path(found.sources[0]).name == "b.jpg"
    bad = (
        "{",
        "[]",
        '{"file": "a.png"}',
        '{"file": 3, "caption": ""}',
        '{"file": "../a.png", "caption": ""}',
        "[" * 10**5,
    )
    unreadable(listing, lambda: own_folder(tmp_path), dict.fromkeys(bad, "line 1") | {"": ""})
    listing.write_text(lines, encoding="utf-8")
    (tmp_path / "images" / "a.png").unlink()
    refused(MissingData, r"a\.png", own_folder, tmp_path)
    refused(MissingData, "nowhere", own_folder, tmp_path / "nowhere")


@pytest.fixture
def pictures(tmp_path: Path) -> Captioned:
    rows = [f'{{"file": "{i}.png", "caption": "picture {i}"}}\n' for i in range(12)]
    for i in range(12):
        picture(tmp_path / "images" / f"{i}.png", (40, 30) if i % 2 else (24, 50), i)
    (tmp_path / "captions.jsonl").write_text("".join(rows))
    return own_folder(tmp_path)


def test_test_samples_have_what_their_prompts_describe(pictures: Captioned) -> None:
    test = Degraded(pictures, 16, **TASKS["parameterised"])
    for i in range(len(test)):
        sample, again = test[i], test[i]
        assert sample.clean.shape == (3, 16, 16)
        assert sample.semantic == f"picture {i}" and parse(sample.restoration) == sample.ops
        assert torch.equal(degrade(sample.clean, parse(sample.restoration), (0, i)), sample.degraded)
        assert torch.equal(again.degraded, sample.degraded) and again[2:] == sample[2:]
    assert not torch.equal(Degraded(pictures, 16, seed=1, **TASKS["parameterised"])[0].degraded, test[0].degraded)
    sample = Degraded(pictures, 16, **TASKS["real-esrgan"])[0]  # has no words
    assert sample.restoration == BLIND and sample.ops is None and sample.semantic == "picture 0"
    sample = Degraded(pictures, 16, Recipe(skip=1.0), **TASKS["parameterised"])[0]
    assert torch.equal(sample.clean, sample.degraded) and sample.restoration == "" and sample.ops == ()


def test_training_samples_are_drawn_with_the_probabilities(pictures: Captioned) -> None:
    torch.manual_seed(0)
    train = Degraded(pictures, 8, share_blind=0.4, blind_prompt=0.2, no_caption=0.3)
    found = [train[i % 12] for i in range(240)]
    named = [s for s in found if s.ops is not None]
    assert abs(len(named) / 240 - 0.6) < 0.1
    assert abs(np.mean([s.restoration == BLIND for s in named]) - 0.2) < 0.1
    assert abs(np.mean([s.semantic == "" for s in found]) - 0.3) < 0.1
    assert all(s.restoration == BLIND for s in found if s.ops is None)
    # other numbers in each epoch, and the same again
    seeded = fit._Seeded(Degraded(pictures, 8), 3)
    a, b, c = seeded[0, 5], seeded[1, 5], seeded[0, 5]
    assert torch.equal(a.degraded, c.degraded) and not torch.equal(a.degraded, b.degraded)
    refused(BadParameter, "share_blind", Degraded, pictures, 8, share_blind=2)


def test_prompts_of_a_test(pictures: Captioned) -> None:
    found = [Degraded(pictures, 8, **TASKS["parameterised"])[i] for i in (0, 1, 2)]
    semantic, named = [s.semantic for s in found], [s.restoration for s in found]
    assert len(set(named)) == 3
    expected = {
        "own": (semantic, named),
        "no text": ([""] * 3, [BLIND] * 3),
        "semantic only": (semantic, [BLIND] * 3),
        "blind prompt": (semantic, [BLIND] * 3),
        "restoration only": ([""] * 3, named),
        "wrong semantic prompt": ([semantic[1], semantic[2], semantic[0]], named),
        "wrong restoration prompt": (semantic, [named[1], named[2], named[0]]),
        "prompts swapped": (named, semantic),
    }
    assert {kind: texts(found, kind) for kind in TEXTS} == expected
    refused(BadParameter, "samples", texts, found[:1], "wrong semantic prompt")


def test_squares_are_the_middle_or_anywhere() -> None:
    x = torch.linspace(0, 1, 30).expand(3, 10, 30)
    for where, left in ((0.0, 0), (0.5, 10), (1.0, 20)):
        assert torch.equal(restoration._square(x, 10, where), x[:, :, left : left + 10])
        assert torch.equal(restoration._square(x.mT, 10, where), x.mT[:, left : left + 10])
    assert restoration._square(x, 7, 0.3).shape == (3, 7, 7) and restoration._square(x, 64, 0.5).shape == (3, 64, 64)


def test_fetch_of_div2k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def download(url: str, root: str, md5: str) -> None:
        fetched.append(url.rpartition("/")[2])
        (Path(root) / fetched[-1][:-4]).mkdir()
        for i in numbers[md5]:
            (Path(root) / fetched[-1][:-4] / f"{i:04d}.png").touch()

    numbers = {"train": range(1, 3), "test": range(801, 803)}
    monkeypatch.setattr(restoration, "DIV2K", {split: (found, split) for split, found in numbers.items()})
    monkeypatch.setattr(restoration, "download_and_extract_archive", download)
    for _ in range(2):  # what is there is left alone
        assert data.fetch("restoration/div2k", tmp_path, progress=False) == tmp_path / "div2k"
    assert fetched == ["DIV2K_train_HR.zip", "DIV2K_valid_HR.zip"]
    test = load("restoration/div2k", tmp_path, "test")
    assert [Path(path).name for path in test.sources] == ["0801.png", "0802.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["div2k"]
