"""Readers of images with captions, the degraded samples, and errors of broken files."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from companion import data
from companion.data import restoration, restoration_sets
from companion.data.degradations import BLIND, Recipe, degrade, parse
from companion.data.restoration import TASKS, TEXTS, Captioned, Degraded, load, own_folder, read_captions, texts
from companion.errors import BadParameter, CompanionError, CorruptFile, MissingData
from companion.ops.files import write_json
from companion.training import fit
from tests.data.conftest import expect, refused

ONE = [{"id": 1, "file_name": "a"}]
LINES = '{"file": "a.png", "caption": "a zebra  on grass"}\n\n{"file": "b.jpg", "caption": ""}\n'


def picture(path: Path, size: tuple[int, int] = (20, 12), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    picture(folder / "images" / "a.png"), picture(folder / "images" / "b.jpg", seed=1)
    (folder / "captions.jsonl").write_text(LINES)
    return folder


@pytest.fixture
def coco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    expect(monkeypatch, "restoration/coco", sizes={"train": 2, "test": 2})
    for split in ("train", "val"):
        images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 12, "width": 20} for i in (9, 3)]
        said = (7, 9, "a later one"), (5, 9, "A zebra\n on  grass."), (8, 3, "Oranges.")
        captions = [{"id": number, "image_id": i, "caption": text} for number, i, text in said]
        file = tmp_path / "coco" / "annotations" / f"captions_{split}2017.json"
        write_json(file, {"images": images, "annotations": captions})
        for i in (9, 3):
            picture(tmp_path / "coco" / f"{split}2017" / f"{i:012d}.jpg")
    return tmp_path


def test_coco_gives_the_first_caption_by_id(coco: Path, monkeypatch) -> None:
    pictures = load("restoration/coco", coco, "test")
    assert pictures.captions == ("Oranges.", "A zebra on grass.") and len(pictures) == 2
    image, caption = pictures[1]
    assert image.shape == (3, 12, 20) and image.dtype == torch.float32 and caption == "A zebra on grass."
    assert image.min() >= 0 and image.max() <= 1
    assert data.status("restoration/coco", coco).state == "present"
    (coco / "coco" / "val2017" / "000000000003.jpg").unlink()
    assert data.status("restoration/coco", coco).state == "incomplete"
    refused(MissingData, r"000000000003\.jpg is not there", load, "restoration/coco", coco, "test")
    expect(monkeypatch, "restoration/coco", sizes={"train": 2, "test": 5000})
    refused(MissingData, "has 2 images, 5,000 are expected", load, "restoration/coco", coco, "test")
    refused(BadParameter, "split", load, "restoration/coco", coco, "val")


def test_own_folder(own: Path, tmp_path: Path) -> None:
    pictures = own_folder(own)
    assert pictures.captions == ("a zebra on grass", "") and pictures[0][0].shape == (3, 12, 20)
    (own / "captions.jsonl").unlink()
    assert own_folder(own).captions == ("", "")
    (own / "images" / "._a.png").write_text("hidden")
    (own / "images" / "c.gif").write_bytes((own / "images" / "a.png").read_bytes())
    assert [Path(file).name for file in own_folder(own / "images").sources] == ["a.png", "b.jpg", "c.gif"]
    (own / "captions.jsonl").write_text(LINES)
    (own / "images" / "a.png").unlink()
    refused(MissingData, r"a\.png", own_folder, own)
    refused(MissingData, r"captions\.jsonl", own_folder, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused(MissingData, "no images", own_folder, tmp_path / "empty")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1"),
        ('{"file": "a.png"}', "caption"),
        ('{"file": 3, "caption": ""}', "line 1"),
        ("[]", "line 1"),
        ('{"file": "../a.png", "caption": ""}', "leaves"),
        ("", "no images"),
    ],
)
def test_broken_captions_of_an_own_folder(own: Path, line: str, said: str) -> None:
    (own / "captions.jsonl").write_text(line)
    refused(CorruptFile, said, own_folder, own)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([], "'images'"),
        ({"images": [], "annotations": []}, "no images"),
        ({"images": [{"id": 1}], "annotations": []}, r"images\[0\]: 'file_name'"),
        ({"images": [{"id": "1", "file_name": "a"}], "annotations": []}, r"images\[0\]: 'id'"),
        ({"images": [{"id": 1, "file_name": "/etc/passwd"}], "annotations": []}, "leaves"),
        ({"images": ONE, "annotations": [{"id": 1, "image_id": 1}]}, r"annotations\[0\]: 'cap"),
        ({"images": ONE, "annotations": [{"id": 1, "image_id": 2, "caption": ""}]}, "no image"),
    ],
)
def test_broken_captions_of_coco(tmp_path: Path, found: object, said: str) -> None:
    write_json(tmp_path / "captions.json", found)
    refused(CorruptFile, said, read_captions, tmp_path / "captions.json")


def test_fetch_verifies_and_unpacks(served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DIV2K with two images per split; nothing of a damaged archive is left."""
    (server, address), root = served, tmp_path / "data"
    numbers, facts = {"train": range(1, 3), "test": range(801, 803)}, {}
    for split, name in restoration_sets.FOLDERS["restoration/div2k"].items():
        for i in numbers[split]:
            picture(server / name / f"{i:04d}.png")
        archive = Path(shutil.make_archive(str(server / name), "zip", server, name))
        facts[split] = numbers[split], hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(restoration, "DIV2K", facts)
    monkeypatch.setattr(restoration, "DIV2K_URL", f"{address}/")
    whole = (server / "DIV2K_train_HR.zip").read_bytes()
    (server / "DIV2K_train_HR.zip").write_bytes(whole[:-10])
    refused(CompanionError, "could not be downloaded", data.fetch, "restoration/div2k", root, progress=False)
    assert list(root.iterdir()) == []
    (server / "DIV2K_train_HR.zip").write_bytes(whole)
    for _ in range(2):  # what is there is left alone
        assert data.fetch("restoration/div2k", root, progress=False) == root / "div2k"
    assert load("restoration/div2k", root, "test").captions == ("", "")
    assert sorted(p.name for p in root.iterdir()) == ["div2k"]


@pytest.fixture
def pictures(tmp_path: Path) -> Captioned:
    folder = tmp_path / "many"
    for i in range(12):
        picture(folder / "images" / f"{i:02d}.png", (40, 30) if i % 2 else (24, 50), i)
    rows = [f'{{"file": "{i:02d}.png", "caption": "picture {i}"}}' for i in range(12)]
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return own_folder(folder)


def test_samples_have_what_their_texts_say(pictures: Captioned) -> None:
    test = Degraded(pictures, 16, **TASKS["parameterised"])
    for i in range(len(test)):
        sample = test[i]
        assert sample.clean.shape == sample.degraded.shape == (3, 16, 16)
        assert sample.semantic == f"picture {i}" and parse(sample.restoration) == sample.ops
        assert torch.equal(degrade(sample.clean, parse(sample.restoration), (0, i)), sample.degraded)
        again = test[i]
        assert torch.equal(again.degraded, sample.degraded) and again[2:] == sample[2:]
    assert not torch.equal(Degraded(pictures, 16, seed=1, **TASKS["parameterised"])[0].degraded, test[0].degraded)
    batch = default_collate([test[i][:4] for i in range(3)])
    assert batch[0].shape == (3, 3, 16, 16) and batch[2] == tuple(f"picture {i}" for i in range(3))


def test_samples_without_instructions(pictures: Captioned) -> None:
    """Real-ESRGAN's have no words; where all is skipped nothing is changed."""
    sample = Degraded(pictures, 16, **TASKS["real-esrgan"])[0]
    assert sample.restoration == BLIND and sample.ops is None and sample.semantic == "picture 0"
    sample = Degraded(pictures, 16, Recipe(skip=1.0), **TASKS["parameterised"])[0]
    assert torch.equal(sample.clean, sample.degraded) and sample.restoration == "" and sample.ops == ()


def test_dice_of_training(pictures: Captioned) -> None:
    torch.manual_seed(0)
    train = Degraded(pictures, 8, share_blind=0.4, blind_prompt=0.2, no_caption=0.3)
    found = [train[i % 12] for i in range(600)]
    named = [s for s in found if s.ops is not None]
    assert abs(len(named) / 600 - 0.6) < 0.06
    assert abs(np.mean([s.restoration == BLIND for s in named]) - 0.2) < 0.06
    assert abs(np.mean([s.semantic == "" for s in found]) - 0.3) < 0.06
    assert all(s.restoration == BLIND for s in found if s.ops is None)
    torch.manual_seed(0)
    again = [train[i % 12] for i in range(600)]
    assert all(torch.equal(a.degraded, b.degraded) and a[2:] == b[2:] for a, b in zip(found, again, strict=True))
    # other numbers in each epoch, and the same again
    seeded = fit._Seeded(Degraded(pictures, 8), 3)
    a, b, c = seeded[0, 5], seeded[1, 5], seeded[0, 5]
    assert torch.equal(a.degraded, c.degraded) and not torch.equal(a.degraded, b.degraded)


def test_texts_of_a_test(pictures: Captioned) -> None:
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
    refused(BadParameter, "wrong semantic prompt", texts, found, "wrong")
    refused(BadParameter, "with another", texts, found[:1], "wrong semantic prompt")


def test_squares_are_the_middle_or_anywhere() -> None:
    x = torch.linspace(0, 1, 30).expand(3, 10, 30)
    assert torch.equal(restoration._square(x, 10, 0.5), x[:, :, 10:20])
    assert torch.equal(restoration._square(x, 10, 0.0), x[:, :, :10])
    assert torch.equal(restoration._square(x, 10, 1.0), x[:, :, 20:])
    assert restoration._square(x, 7, 0.3).shape == restoration._square(x, 7, 0.9).shape == (3, 7, 7)
    assert restoration._square(x, 64, 0.5).shape == (3, 64, 64)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"size": 0}, "1 pixel"), ({"share_blind": 2}, "probability"), ({"no_caption": -0.1}, "0 to 1")],
)
def test_bad_arguments(pictures: Captioned, options: dict, said: str) -> None:
    refused(BadParameter, said, Degraded, pictures, **{"size": 8, **options})
