"""Every file of a folder of own data at its edge, and every argument of a function that reads or splits data."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from companion.data import (
    attributes,
    classification,
    climate,
    detection,
    domains,
    fewshot,
    landcover,
    pretraining,
    pyramids,
    restoration,
    slides,
    tracking,
    xrays,
)
from companion.errors import CompanionError
from companion.models.promptpar import transforms
from tests.edges.common import Edge, check

Content = str | bytes | tuple[int, ...] | None  # a text, bytes, an image of this size (and value), or no file
Files = dict[str, Content]


@dataclass
class Folder:
    """A small right folder of own data, and its reader."""

    own: Callable
    files: Files


def write(folder: Path, files: Files) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.unlink()
        elif isinstance(content, tuple):
            height, width, *value = content
            noise = np.random.default_rng(sum(name.encode())).integers(0, 255, (height, width, 3), np.uint8)
            pixels = np.full((height, width), value[0], np.uint8) if value else noise
            Image.fromarray(pixels).save(path, "PNG")
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)


def images(*names: str, size: tuple[int, ...] = (12, 16)) -> Files:
    return dict.fromkeys(names, size)


def classes(*folders: str) -> Files:
    return images(*(f"{folder}{c}/{c}{i}.png" for folder in folders for c in "ab" for i in range(6)))


def split(**other: list) -> str:
    known = {"train": (0, 1, 2), "val": (3,), "test": (4, 5)}
    listed = {s: [[f"{c}/{c}{i}.png", n, c] for n, c in enumerate("ab") for i in rows] for s, rows in known.items()}
    return json.dumps(listed | other)


SHOP: dict[str, list] = {
    "images": [{"id": i, "file_name": f"{i}.png", "width": 16, "height": 12} for i in range(3)],
    "categories": [{"id": i, "name": name} for i, name in enumerate(("apple", "pear", "kiwi"))],
    "annotations": [{"id": i, "image_id": i, "category_id": i, "bbox": [1, 1, 4, 4]} for i in range(3)],
}


def shop(part: str, **changed: object) -> Files:
    """The file of boxes with another first entry of a part."""
    return {"annotations.json": json.dumps(SHOP | {part: [SHOP[part][0] | changed, *SHOP[part][1:]]})}


def more(part: str, **changed: object) -> Files:
    return {"annotations.json": json.dumps(SHOP | {part: [*SHOP[part], SHOP[part][0] | changed]})}


CHESTS = images(*(f"im/{i}.png" for i in range(6)))
PEOPLE = "image,split,a hat,a bag\n" + "".join(
    f"im/{i}.png,{s},{i % 2},{i // 3}\n" for i, s in enumerate(("train", "val", "test") * 2)
)
SLIDES = "slide_id,label,patient\n" + "".join(f"s{i},{i % 3},p{i // 2}\n" for i in range(6))
PLACES = "image,latitude,longitude,zone,text\nx,-3.1,-60,,wet\ny.png,52.4,13.1,,\n"
BOXES = "".join(f"{i},2,4,5\n" for i in range(1, 6))
CAPTIONS = "".join(json.dumps({"file": f"{i}.png", "caption": f"a {i}"}) + "\n" for i in range(3))
LABELS = {"train_list.txt": "im/0.png 0 1\nim/1.png 1 0\n", "val_list.txt": "im/2.png 1 1\n"}
MASKS = {
    "train_list.csv": "img_path,mask_path\nim/0.png,m/0.png\n",
    "test_list.csv": "img_path,mask_path\nim/1.png,m/1.png\n",
}
CHEST_BOXES = 'image_path,bbox\nim/0.png,"[[1, 1, 9, 9]]"\n'
RIGHT = {
    "classes": Folder(classification.own, classes("")),
    "classes and splits": Folder(classification.own, classes("train/", "val/", "test/")),
    "domains": Folder(domains.own, classes("")),
    "listed domains": Folder(domains.own, classes("") | {"split.json": split()}),
    "attributes": Folder(attributes.own, CHESTS | {"labels.csv": PEOPLE}),
    "videos": Folder(
        tracking.own,
        images(*(f"w/{s}/{i}.png" for s in ("visible", "infrared") for i in range(5))) | {"w/boxes.txt": BOXES},
    ),
    "land": Folder(
        lambda root: landcover.own(root, ["field", "wood"]),
        images("images/x.png", "images/y.png", "images/z.png")
        | images("labels/x.png", "labels/y.png", "labels/z.png", size=(12, 16, 1))
        | {"places.csv": PLACES, "train.txt": "x.png\n", "test.txt": "z.png\n"},
    ),
    "chests": Folder(lambda root: xrays.own(root, ["a", "b"]), CHESTS | LABELS),
    "masks of chests": Folder(
        lambda root: xrays.own(root, task="segmentation"),
        CHESTS | images("m/0.png", "m/1.png", size=(12, 16, 255)) | MASKS,
    ),
    "boxes of chests": Folder(lambda root: xrays.own(root, task="detection"), CHESTS | {"train_list.csv": CHEST_BOXES}),
    "reports": Folder(
        lambda root: {"train": xrays.own(root, task="pre-training")["train"].images},
        CHESTS | {"pretrain.csv": "img_path,report\nim/0.png,No mass.\n"},
    ),
    "boxes": Folder(
        lambda root: detection.own(root, ["kiwi"]),
        images(*(f"images/{i}.png" for i in range(3))) | {"annotations.json": json.dumps(SHOP)},
    ),
    "no labels": Folder(pretraining.own, images("q/0.png", "q/1.png")),
    "slides in folders": Folder(slides.own, {f"{g}/s{g}{i}.svs": "x" for g in range(3) for i in range(2)}),
    "slides": Folder(slides.own, {f"s{i}.svs": "x" for i in range(6)} | {"labels.csv": SLIDES}),
    "captions": Folder(restoration.own, images(*(f"images/{i}.png" for i in range(3))) | {"captions.jsonl": CAPTIONS}),
    "pairs": Folder(
        restoration.own, images("high/0.png", "high/1.png") | images("low/0x4.png", "low/1x4.png", size=(3, 4))
    ),
}
TABLES = [
    (name, file)
    for name, right in RIGHT.items()
    for file, text in right.files.items()
    if isinstance(text, str) and file[-4:] != ".svs"
]
PICTURES = [
    (name, next(f for f, c in right.files.items() if isinstance(c, tuple)))
    for name, right in RIGHT.items()
    if "slides" not in name
]


def read(name: str, root: Path) -> dict[str, list]:
    """All that a reader gives, by split."""

    def told(item: object) -> object:
        if isinstance(item, torch.Tensor | np.ndarray):
            return (*item.shape, float(np.asarray(item).astype(float).sum()))
        return [told(part) for part in item] if isinstance(item, tuple) else str(item).replace(str(root), "")

    found: dict[str, list] = {}
    for split_, data in RIGHT[name].own(root).items():
        rows = [data[i] for i in range(len(data))] if hasattr(data, "part") else data
        found[split_] = [told((row.boxes, row.frame(0)) if hasattr(row, "frame") else row) for row in rows]
    return found


def right(name: str, folder: Path) -> tuple[Path, dict[str, list]]:
    write(folder / "own", RIGHT[name].files)
    return folder / "own", read(name, folder / "own")


# --- what every reader has to stand -----------------------------------------------------------------------------------

JUNK = (".DS_Store", "Thumbs.db", "desktop.ini")


@pytest.mark.parametrize("name", RIGHT)
def test_what_systems_add_is_not_read_and_a_set_is_the_same_again(name, tmp_path):
    root, expected = right(name, tmp_path)
    pickle.loads(pickle.dumps(RIGHT[name].own(root)))
    for file, place in ((file, place) for file in RIGHT[name].files for place in (".old", "__MACOSX")):
        (hidden := root / Path(file).parent / place).mkdir(exist_ok=True)
        shutil.copy(root / file, hidden)
        (root / file).with_name(f"._{Path(file).name}").write_bytes(b"\0\5")
    for file in JUNK:
        (root / file).write_bytes(b"x")
    assert read(name, root) == expected
    root.rename(tmp_path / "real")
    root.symlink_to(tmp_path / "real")
    assert read(name, root) == expected


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("kind", ["file", "nothing", "empty"])
def test_a_root_without_data_is_refused(name, kind, tmp_path):
    if kind == "empty":
        (tmp_path / "own").mkdir()
    elif kind == "file":
        (tmp_path / "own").write_text("x")
    for root in (tmp_path / "own", str(tmp_path / "own"), "", None, 0):
        with pytest.raises(CompanionError):
            read(name, root)


@pytest.mark.parametrize(("name", "file"), TABLES)
def test_a_text_is_read_in_each_form_or_refused(name, file, tmp_path):
    root, expected = right(name, tmp_path)
    path, text = root / file, (root / file).read_text()
    for same in (f"\ufeff{text}", text.replace("\n", "\r\n"), text.rstrip("\n"), f"{text}\n\n"):
        path.write_bytes(same.encode())
        assert read(name, root) == expected, same
    for wrong in (b"", b" \n\n", text.encode("utf-16"), text.encode() + b"\xe4", text.encode() + b"\0"):
        path.write_bytes(wrong)
        with pytest.raises(CompanionError):
            read(name, root)


@pytest.mark.parametrize(("name", "file"), PICTURES)
def test_an_image_that_is_none_is_refused(name, file, tmp_path):
    root, _ = right(name, tmp_path)
    content = (root / file).read_bytes()
    for wrong in (b"", content[:-30], b"<html>no</html>"):
        (root / file).write_bytes(wrong)
        with pytest.raises(CompanionError, match=Path(file).name):
            read(name, root)
    (root / file).unlink()
    (root / file).symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(CompanionError, match=Path(file).name):
        read(name, root)


@pytest.mark.parametrize("name", [name for name in dict(TABLES) if name != "videos"])
def test_a_listed_image_that_is_not_there_is_refused_before_any_is_read(name, tmp_path):
    root, _ = right(name, tmp_path)
    for file in [file for file in RIGHT[name].files if file.endswith((".png", ".svs"))]:
        if not file.startswith("labels/") and Path(file).stem != "5" and (name, file) != ("land", "images/y.png"):
            (root / file).rename(tmp_path / "away")
            if Path(file).name in "".join((root / t).read_text() for n, t in TABLES if n == name):
                with pytest.raises(CompanionError, match=Path(file).stem):
                    RIGHT[name].own(root)
            (tmp_path / "away").rename(root / file)


# --- one change at a time ---------------------------------------------------------------------------------------------

LIST = "im/0.png 0 1\n"
REFUSED: dict[str, list[Files]] = {
    "classes": [{"empty/x.txt": "x"}, {"b/x.png": "x"}],
    "classes and splits": [
        classes("valid/"),
        {"test/c/0.png": (12, 16)},
        {"train/a/a0.png": "the same", "test/a/a0.png": "the same"},
    ],
    "listed domains": [
        *({"split.json": split(train=rows)} for rows in ([], {}, [[]], "x", None, [["a/a0.png"]])),
        *(
            {"split.json": split(val=[[path, 0, "a"], ["b/b3.png", 1, "b"]])}
            for path in ("./a/a0.png", "a//a0.png", "../a.png", "/a.png", "a/a9.png", "")
        ),
        *({"split.json": split(val=[["a/a3.png", label, "a"]])} for label in (-1, 1, 2, 0.0, True, None, "٣", "0 ")),
        {"split.json": split().replace('"b"]', '"a"]')},
        {"split.json": split().replace('"b"]', '" "]')},
        {"split.json": "[]"},
    ],
    "attributes": [
        *(
            {"labels.csv": PEOPLE.replace("image,split,a hat,a bag", head)}
            for head in (
                "image,split,a hat,a hat",
                "image,split,a hat,A hat",
                "image,split,a hat, a hat",
                "image,split,,a hat",
                "image,part,a hat,a bag",
                "im/0.png,train,0,0",
            )
        ),
        *({"labels.csv": PEOPLE.replace(",train,", f",{other},")} for other in (" train", "training", "")),
        *(
            {"labels.csv": f"{PEOPLE}{row}\n"}
            for row in (
                "im/0.png,test,0,0",
                "./im/0.png,test,0,0",
                "im//0.png,test,0,0",
                "im/9.png,test,0,0",
                "../im/0.png,test,0,0",
                "im/0.png,test,0",
            )
        ),
        *(
            {"labels.csv": PEOPLE.replace("0.png,train,0", f"0.png,train,{cell}")}
            for cell in ("0.5", " 1", "٣", "nan", "-1", "2", "", "1_000", "yes")
        ),
        {"labels.csv": PEOPLE.replace(",", ";")},
        {"labels.csv": PEOPLE.partition("\n")[0]},
    ],
    "videos": [
        *(
            {"w/boxes.txt": BOXES.replace("1,2,4,5", box)}
            for box in ("1,2,-4,5", "99,2,4,5", "1,-9,4,5", "1,2,nan,5", "1,2,4", "1,2,4,5,6", "a,2,4,5", "")
        ),
        {"w/boxes.txt": "0,0,0,0\n" * 5},
        {"w/boxes.txt": f"x,y,w,h\n{BOXES}"},
        {"w/boxes.txt": BOXES.replace(",", ";")},
        {"w/infrared/2.png": None},
        {"w/infrared/0.png": (12, 12)},
    ],
    "land": [
        *(
            {"places.csv": PLACES + row}
            for row in (
                "q,,,Af,\n",
                " z,,,Af,\n",
                "x.png,,,Af,\n",
                "z,99,1,,\n",
                "z,nan,1,,\n",
                "z,1,,,\n",
                "z,,,Xx,\n",
                "z,,,\n",
            )
        ),
        *(
            {"train.txt": names}
            for names in ("x.png\nx.png\n", "./x.png\n", "x.png\nz.png\n", "q.png\n", "../images/x.png\n")
        ),
        {"Training.txt": "y.png\n"},
        {"images/x.jpg": (12, 16)},
        {"labels/x.tif": (12, 16, 1)},
        {"labels/x.png": None, "labels/x.jpg": (12, 16, 1)},
        {"labels/x.png": (16, 12, 1)},
        {"labels/x.png": None, "labels/q.png": (12, 16, 1)},
    ],
    "chests": [
        *(
            {"train_list.txt": LIST + line}
            for line in (
                LIST,
                f"./{LIST}",
                LIST.replace("/", "//"),
                "im/2.png 0 1\n",
                "im/9.png 0 1\n",
                "../im/1.png 0 1\n",
                "im/1.png 0\n",
                "im/1.png 0 1 1\n",
                "im/1.png 0 2\n",
                "im/1.png 0 1.0\n",
                "im/1.png 0 ٣\n",
                "im/1.png,0,1\n",
            )
        ),
        {"validation_list.txt": LIST},
    ],
    "masks of chests": [
        *({"m/0.png": size} for size in ((16, 12, 255), (12, 16, 128), (12, 16, 2), (12, 16, 127))),
        {"train_list.csv": MASKS["train_list.csv"] + "im/1.png,m/1.png\n"},
        {"train_list.csv": MASKS["train_list.csv"] + "im/2.png,m/9.png\n"},
        {"train_list.csv": "img_path,mask_path\n"},
    ],
    "boxes of chests": [
        *(
            {"train_list.csv": CHEST_BOXES.replace("[[1, 1, 9, 9]]", box)}
            for box in ("", "[1, 2]", "[[9, 1, 1, 9]]", "[[1, 1, 1, 9]]", "[[-1, 1, 9, 9]]", "[[1, 1, 9, 9999]]", "nan")
        ),
        {"train_list.csv": CHEST_BOXES + CHEST_BOXES.partition("\n")[2]},
    ],
    "boxes": [
        *(
            shop("annotations", bbox=box)
            for box in (
                [0, 0, 0, 0],
                [1, 1, 0, 4],
                [1, 1, -1, 4],
                [20, 1, 4, 4],
                [-9, 1, 4, 4],
                ["1", 1, 4, 4],
                [1, 1, 4],
                float("nan"),
            )
        ),
        *(
            shop("annotations", **{key: value})
            for key, value in (
                ("iscrowd", 2),
                ("iscrowd", -1),
                ("area", -1),
                ("area", "1"),
                ("image_id", 9),
                ("category_id", 9),
                ("category_id", "1"),
                ("id", 1),
            )
        ),
        *(
            shop("images", **{key: value})
            for key, value in (
                ("file_name", "1.png"),
                ("file_name", "./1.png"),
                ("file_name", "9.png"),
                ("file_name", "../0.png"),
                ("width", 12),
                ("height", 0),
                ("id", 1),
                ("id", None),
                ("pos_category_ids", [9]),
            )
        ),
        *(shop("categories", name=name) for name in ("pear", " pear", "", " ", None, 1)),
        *(more("images", id=9), more("annotations"), more("categories")),
        *(
            {"annotations.json": json.dumps(SHOP | {part: value})}
            for part in SHOP
            for value in ([], None, {}, [1], "x")
        ),
        {"annotations.json": "[]"},
    ],
    "slides in folders": [{"s9.svs": "x"}, {"1/s00.svs": "x"}, {"1/s00_mask.svs": "x"}, {"1/a/s00.svs": "x"}],
    "slides": [
        *(
            {"labels.csv": SLIDES.replace("s0,0,p0", row)}
            for row in (
                "s0,0,",
                "s0,0,nan",
                "s0,0,unknown",
                "s0,,p0",
                "s0,nan,p0",
                "s0,-1,p0",
                "s0,1.5,p0",
                "s0,a,p0",
                "s9,0,p0",
                "./s0,0,p0",
                " s0,0,p0",
                "s1,0,p0",
                ",0,p0",
            )
        ),
        *(
            {"labels.csv": SLIDES.replace("slide_id,label,patient", head)}
            for head in (
                "slide,label,patient",
                "slide_id,label,label",
                "slide_id,label,Label",
                "slide_id,Label,patient",
            )
        ),
        {"labels.csv": "slide_id,label\ns0,0\ns1,0\n"},
        {"labels.csv": "slide_id,label\n"},
        {"sub/s0.tif": "x"},
    ],
    "captions": [
        *(
            {"captions.jsonl": CAPTIONS + line}
            for line in (
                "[1]",
                '{"file": "0.png"}',
                '{"file": "0.png", "caption": "x"}',
                '{"file": "./0.png", "caption": "x"}',
                '{"file": "9.png", "caption": "x"}',
                '{"file": "../0.png", "caption": "x"}',
                '{"file": 1, "caption": "x"}',
                '{"file": "0.png", "caption": null}',
            )
        ),
        {"captions.jsonl": "[]"},
    ],
    "pairs": [
        {"low/0x4.png": (4, 3)},
        {"low/0x4.png": (6, 12)},
        {"low/0.png": (3, 4), "high/0.jpg": (12, 16)},
        {"low/0x2.png": (6, 8)},
        {"low/0x4.png": None},
        {"high/2.png": (12, 16)},
    ],
}
READ: dict[str, list[tuple[Files, dict[str, int]]]] = {
    "classes": [({"a/sub/x.png": (12, 16)}, {"trainval": 13}), ({"a/X.PNG": (12, 16)}, {"trainval": 13})],
    "attributes": [({"labels.csv": PEOPLE.replace("im/0", "./im/0")}, {"train": 2})],
    "land": [
        ({"train.txt": None}, {"train": 2, "test": 1, "all": 3}),
        ({"train.txt": None, "TRAINING.txt": "x.png\n"}, {"train": 1, "test": 1}),
        ({"validation.txt": "y.png\n"}, {"train": 1, "val": 1, "test": 1}),
        ({"labels/x.png": None}, {"train": 1}),
    ],
    "chests": [({"Testing_list.txt": "im/3.png 0 0\n"}, {"train": 2, "val": 1, "test": 1})],
    "no labels": [({"Training/0.png": (12, 16)}, {"train": 1}), ({"q/0.PNG": (1, 1)}, {"train": 3})],
    "slides in folders": [({"1/deep/s.SVS": "x"}, {"train": 7})],
    "slides": [({"labels.csv": SLIDES.replace("s0,0", "s0.svs, 0")}, {"train": 6})],
    "captions": [({"captions.jsonl": CAPTIONS.replace("a 0", "a\u2028b")}, {"train": 3})],
    "pairs": [({"low/0x4.png": (3, 3, 9), "high/0.png": (11, 13)}, {"train": 2})],
}


@pytest.mark.parametrize(
    ("name", "number"), [(name, i) for name, changes in REFUSED.items() for i in range(len(changes))]
)
def test_a_wrong_folder_is_refused(name, number, tmp_path):
    root, _ = right(name, tmp_path)
    write(root, REFUSED[name][number])
    with pytest.raises(CompanionError):
        read(name, root)


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, changes in READ.items() for i in range(len(changes))])
def test_an_odd_folder_is_read(name, number, tmp_path):
    root, _ = right(name, tmp_path)
    changed, sizes = READ[name][number]
    write(root, changed)
    found = {split_: len(rows) for split_, rows in read(name, root).items()}
    assert found == found | sizes


@pytest.mark.parametrize("name", ["chests", "land"])
def test_a_link_is_the_file_that_it_leads_to(name, tmp_path):
    root, _ = right(name, tmp_path)
    listed, image = {"chests": ("val_list.txt", "im/2.png"), "land": ("test.txt", "images/z.png")}[name]
    (root / image).unlink()
    (root / image).symlink_to(root / {"chests": "im/0.png", "land": "images/x.png"}[name])
    assert image.rpartition("/")[2] in (root / listed).read_text()
    with pytest.raises(CompanionError):
        RIGHT[name].own(root)


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    top = tmp_path_factory.mktemp("data")
    for name, folder in RIGHT.items():
        write(top / name, folder.files)
    for i in range(6):
        torch.save(torch.zeros(3, 4), top / "slides" / f"s{i}.pt")
    pyramids.write_pyramid(top / "p.tiff", np.zeros((64, 64, 3), np.uint8), 0.5, (1, 2), 16)
    return top


ANY = "0, -1, 1, 2.5, nan, inf, 'x', None"  # of an argument that is another one's in the call
MANY = [slides.Item(f"s{i}", Path(), i % 2) for i in range(8)]


def few(root: Path) -> Edge:
    train = classification.own(root / "classes and splits")["train"]
    given = {"dataset": 1, "shots": 2, "seed": 3}
    accepts = {"dataset": ANY, "shots": "1", "seed": "0, 1"}
    return Edge(
        lambda dataset, shots, seed: len(fewshot.few_shot(train, shots, seed)), given, accepts, fewshot.few_shot
    )


def repeated(root: Path) -> Edge:
    data = detection.own(root / "boxes")["train"]
    return Edge(
        lambda boxes, threshold: detection.repeat_factors(data, threshold).tolist(),
        {"boxes": 1, "threshold": 0.5},
        {"boxes": ANY, "threshold": "0, 1"},
        detection.repeat_factors,
    )


def own(read: Callable, folder: str, accepts: dict[str, str] | None = None, **given: object) -> Callable[[Path], Edge]:
    """The edges of a reader of own data."""
    return lambda root: Edge(
        lambda **args: len(read(**args)["train"]), {"root": root / folder} | given, accepts or {}, read
    )


ARGUMENTS: dict[str, Callable[[Path], Edge]] = {
    "few_shot": few,
    "repeat_factors": repeated,
    "harmonic_mean": lambda _: Edge(
        fewshot.harmonic_mean, {"base": 50, "novel": 50}, dict.fromkeys(("base", "novel"), "0, 1, 2.5")
    ),
    "halves": lambda _: Edge(
        lambda class_names: len(fewshot.halves(class_names)),
        {"class_names": ["a", "b", "c"]},
        {"class_names": "row less"},
    ),
    "split_folds": lambda _: Edge(
        lambda items, folds, test, seed: len(slides.split_folds(MANY, folds, test, seed)),
        {"items": 1, "folds": 2, "test": 0.5, "seed": 0},
        {"items": ANY, "test": "0", "seed": "0, 1"},
        slides.split_folds,
    ),
    "zone": lambda _: Edge(
        lambda latitude, longitude, reach: len(climate.zone(latitude, longitude, reach) or ""),
        {"latitude": 52.4, "longitude": 13.1, "reach": 2},
        dict.fromkeys(("latitude", "longitude"), "0, -1, 1, 2.5, nan, None") | {"reach": "0, 1"},
        climate.zone,
    ),
    "features": lambda root: Edge(
        lambda items, path, longest, drop: slides.Features(MANY[:6], root / "slides", longest).longest,
        {"items": 1, "path": 1, "longest": 2, "drop": 1},
        dict.fromkeys(("items", "path", "drop"), ANY) | {"longest": "1, None"},
        slides.Features,
    ),
    "padding": lambda _: Edge(
        lambda size, antialias, padding: transforms.PadToSquare(size).size,
        {"size": 8, "antialias": 1, "padding": 1},
        dict.fromkeys(("antialias", "padding"), ANY) | {"size": "1"},
        transforms.PadToSquare,
    ),
    "slide": lambda root: Edge(
        lambda path, mpp: pyramids.Slide(root / "p.tiff", mpp).mpp,
        {"path": 1, "mpp": 0.5},
        {"path": ANY, "mpp": "1, 2.5, None"},
        pyramids.Slide,
    ),
    "classification": own(classification.own, "classes", {"seed": "0, 1"}, transform=None, val_fraction=0.5, seed=0),
    "domains": own(domains.own, "domains", transform=None),
    "attributes": own(attributes.own, "attributes", transform=None),
    "pretraining": own(pretraining.own, "no labels", transform=None),
    "tracking": own(tracking.own, "videos"),
    "slides": own(slides.own, "slides"),
    "restoration": own(restoration.own, "captions"),
    "landcover": own(
        landcover.own,
        "land",
        {"classes": "row less", "size": "1", "stride": "1, None"},
        classes=["a", "b", "c"],
        transform=None,
        size=8,
        stride=8,
    ),
    "xrays": own(xrays.own, "chests", classes=["a", "b"], transform=None, task="classification"),
    "detection": own(detection.own, "boxes", {"novel": "row less"}, novel=["kiwi"]),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name, root):
    assert check(ARGUMENTS[name](root), numbers=lambda found: torch.as_tensor(found).double())
