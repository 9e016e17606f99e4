"""Phantom chests, 64x64 pixels, each with a report of two sentences, an entity, a lesion's box and mask; for ECAMP.

Two dark lungs and a bright heart, and **exactly one finding**, on a random side: a nodule, an effusion (the lung's
lower part), a pneumothorax (its upper part) or an opacity. One sentence of the report names it, another one states that
a different finding is absent; their order is random:

    there is a left nodule . there is no evidence of effusion .

As on a radiograph, "left" is the patient's left and the right of the image. The size of a finding is random and not in
the report. With a larger vocabulary and small findings, a text decoder of this size learned the language and not the
image (the specification, section 14); so reports are short and describe visible content: with a quarter of the patches
visible, a nodule is visible in two of three views.

    <root>/pocket/chests/images/000001.png      16 bit, grey
                         masks/000001.png       the lesion
                         pretrain.csv           img_path,report,llm_output of the training images, as ECAMP's loader
                         attn-label.csv         label_i,label_j, same order: the window of super-resolution, the centre
                         wordpiece.json         the words of the training reports, in the form of `tokenizers`
                         {train,val,test}_list.txt       path and 0 or 1 for each of FINDINGS, as ChestX-ray14's lists
                         {train,val,test}_boxes.csv      image_path,bbox in 1/1024 of the image, as RSNA's
                         {train,val,test}_masks.csv      img_path,mask_path, as RIGA's
                         {val,test}_reports.csv          as pretrain.csv

All images are drawn, none is a photograph; each split has its own random stream.
"""

from __future__ import annotations

import ast
import csv
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from ...errors import CorruptFile, MissingData, check_choice
from ..scenes import SPLITS
from . import read_image, write_once, write_table

SIZE = 64  # side of every image, in pixels
FINDINGS = ("nodule", "effusion", "pneumothorax", "opacity")
SIDES = ("left", "right")  # the patient's
COUNTS = {"train": 2000, "val": 400, "test": 800}
MEAN, STD = 0.5, 0.15  # of the grey values on disk, in 0 to 1
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[MASK]", "[SEP]")  # ids 0 to 4, as in ECAMP's vocabulary
BOX_UNIT = 1024  # the side of the image in which RSNA gives its boxes
VERSION = 2  # to be increased when a change of this file changes the images

_LUNG_X = {"left": 0.7, "right": 0.3}
_LUNG_Y, _HALF_X, _HALF_Y = 0.45, 0.16, 0.33
_SIZES = {"nodule": (0.1, 0.13), "effusion": (0.2, 0.32), "pneumothorax": (0.2, 0.3), "opacity": (0.1, 0.13)}
_ROWS, _COLUMNS = (np.mgrid[:SIZE, :SIZE] + 0.5) / SIZE


@dataclass(frozen=True)
class Chest:
    """An image with its annotations.

    Attributes:
        image: (64, 64) uint16.
        mask: (64, 64) bool, the lesion.
        finding: one of `FINDINGS`.
        side: "left" or "right", the patient's.
        absent: the finding that the report states is absent.
        report: two sentences.
    """

    image: np.ndarray
    mask: np.ndarray
    finding: str
    side: str
    absent: str
    report: str

    @property
    def distilled(self) -> str:
        """A language model's distillation of the report, imitated: a plain sentence about the present entity."""
        return f"there is {self.finding} ."

    @property
    def labels(self) -> list[int]:
        """0 or 1 for each of `FINDINGS`."""
        return [int(self.finding == name) for name in FINDINGS]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the lesion, in pixels; right and bottom are exclusive."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


# --- drawing ----------------------------------------------------------------------------------------------------------


def _oval(x: float, y: float, half_x: float, half_y: float) -> np.ndarray:
    """A soft ellipse (64, 64): 1 inside, 0 outside, half on its edge."""
    far = np.hypot((_COLUMNS - x) / half_x, (_ROWS - y) / half_y)
    return 1 / (1 + np.exp((far - 1) * 12))


def _step(distance: np.ndarray) -> np.ndarray:
    """A soft step from 0 to 1 where `distance`, in units of the image's side, crosses 0, about a pixel wide."""
    return np.clip(0.5 + distance * SIZE, 0, 1)


def _lesion(
    rng: np.random.Generator, finding: str, lung: tuple[float, float, float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """The coverage of a finding, (64, 64) in 0 to 1, and its contribution to the grey values."""
    x, y, half_x, half_y = lung
    size = _SIZES[finding][rng.integers(2)]
    if finding in ("nodule", "opacity"):
        turn, far = rng.uniform(0, 2 * np.pi), 0.7 * np.sqrt(rng.random())
        left, top = x + far * half_x * np.cos(turn), y + far * half_y * np.sin(turn)
        if finding == "nodule":
            where = _step(size - np.hypot(_COLUMNS - left, _ROWS - top))
            return where, 0.5 * where
        where = np.exp(-((_COLUMNS - left) ** 2 + (_ROWS - top) ** 2) / (2 * size**2))
        blocks = np.kron(rng.normal(0, 1, (16, 16)), np.ones((4, 4)))
        return where, where * (0.15 + 0.18 * blocks)
    inside = _oval(*lung)
    if finding == "effusion":
        slope = rng.uniform(-0.4, 0.4)
        where = inside * _step(_ROWS - (y + half_y - size) + slope * (_COLUMNS - x))
        return where, 0.45 * where
    where = inside * _step(y - half_y + size - _ROWS)
    return where, -0.3 * where


def draw(rng: np.random.Generator) -> Chest:
    """A chest with a random finding."""
    finding, side = FINDINGS[rng.integers(4)], SIDES[rng.integers(2)]
    absent = rng.choice([name for name in FINDINGS if name != finding])
    grey = np.full((SIZE, SIZE), 0.55 + rng.normal(0, 0.05)) + 0.1 * (_ROWS - 0.5) * rng.normal()
    lungs = {}
    for name, centre in _LUNG_X.items():
        jitter = rng.normal(0, 0.02, 4)
        lungs[name] = tuple(np.array([centre, _LUNG_Y, _HALF_X, _HALF_Y]) + jitter)
        grey -= 0.32 * _oval(*lungs[name])
    grey += 0.25 * _oval(*(np.array([0.55, 0.66, 0.14, 0.16]) + rng.normal(0, 0.02, 4)))
    where, added = _lesion(rng, finding, lungs[side])
    grey += added + rng.normal(0, 0.04, grey.shape)
    # random exposure
    grey = (grey - grey.mean()) / grey.std() * rng.uniform(0.9, 1.1) + rng.normal(0, 0.1)
    image = np.round(np.clip(MEAN + STD * grey, 0, 1) * 65535).astype(np.uint16)
    negation = ("there is no", "there is no evidence of")[rng.integers(2)]
    sentences = [f"there is a {side} {finding} .", f"{negation} {absent} ."]
    report = " ".join(sentences if rng.random() < 0.5 else sentences[::-1])
    return Chest(image, where > 0.5, finding, side, str(absent), report)


def chests(count: int, split: str, seed: int = 0) -> list[Chest]:
    """`count` chests of a split, deterministic in the arguments. Raises `BadParameter` for an unknown split."""
    check_choice("split", split, SPLITS)
    rng = np.random.default_rng((seed, zlib.crc32(f"chests/{split}".encode())))
    return [draw(rng) for _ in range(count)]


# --- on disk ----------------------------------------------------------------------------------------------------------


def write(root: str | Path, seed: int = 0) -> Path:
    """Write the chests of a seed into `<root>/pocket/chests`, unless they exist, and return that folder.

    The same seed gives the same files.
    """

    def fill(new: Path) -> None:
        number = 0
        for part in ("images", "masks"):
            (new / part).mkdir(parents=True)
        for split, count in COUNTS.items():
            drawn = chests(count, split, seed)
            files = [f"{number + i:06d}.png" for i in range(1, count + 1)]
            number += count
            for file, chest in zip(files, drawn, strict=True):
                Image.fromarray(chest.image).save(new / "images" / file)
                Image.fromarray(chest.mask.astype(np.uint8) * 255).save(new / "masks" / file)
            _lists(new, split, files, drawn)
            if split == "train":
                vocabulary(chest.report for chest in drawn).save(str(new / "wordpiece.json"))

    record = {"seed": seed, "version": VERSION, "counts": COUNTS, "findings": list(FINDINGS)}
    # four lists per split, and for training the attention labels and the vocabulary
    files = 2 * sum(COUNTS.values()) + 4 * len(COUNTS) + 3
    return write_once(Path(root) / "pocket" / "chests", record, files, fill)


def _lists(folder: Path, split: str, files: Sequence[str], drawn: Sequence[Chest]) -> None:
    """The text files of a split."""
    images = [f"images/{file}" for file in files]
    lines = [" ".join([path, *map(str, chest.labels)]) for path, chest in zip(images, drawn, strict=True)]
    (folder / f"{split}_list.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    unit = BOX_UNIT // SIZE
    boxes = [str([[side * unit for side in chest.box]]) for chest in drawn]
    write_table(folder / f"{split}_boxes.csv", ("image_path", "bbox"), zip(images, boxes, strict=True))
    masks = [f"masks/{file}" for file in files]
    write_table(folder / f"{split}_masks.csv", ("img_path", "mask_path"), zip(images, masks, strict=True))
    texts = [(path, chest.report, chest.distilled) for path, chest in zip(images, drawn, strict=True)]
    name = "pretrain" if split == "train" else f"{split}_reports"
    write_table(folder / f"{name}.csv", ("img_path", "report", "llm_output"), texts)
    if split == "train":
        write_table(folder / "attn-label.csv", ("label_i", "label_j"), [(1, 1)] * len(files))


def vocabulary(reports: Iterable[str]) -> Tokenizer:
    """A WordPiece tokenizer of whole words: `SPECIAL`, then the words of `reports` in the order of the alphabet."""
    words = sorted({word for report in reports for word in report.split()} - set(SPECIAL))
    ids = {word: i for i, word in enumerate((*SPECIAL, *words))}
    found = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", continuing_subword_prefix="##"))
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.add_special_tokens(list(SPECIAL))
    return found


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A split in memory.

    Attributes:
        images: (n, 1, 64, 64), standardised by `MEAN` and `STD`.
        labels: (n, 4), 0 or 1 for each of `FINDINGS`.
        masks: (n, 1, 64, 64), 0 or 1.
        boxes: (n, 4), left, top, right and bottom of the lesion, in pixels.
        reports, distilled: n texts each.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor
    boxes: Tensor
    reports: tuple[str, ...]
    distilled: tuple[str, ...]


def read(root: str | Path, split: str) -> Part:
    """Read a split that `write` wrote below `root`.

    Raises:
        BadParameter: an unknown split.
        MissingData: the folder does not exist.
        CorruptFile: an image or a list cannot be read; its path is in the message.
    """
    check_choice("split", split, SPLITS)
    folder = Path(root) / "pocket" / "chests"
    if not (folder / "chests.json").is_file():
        layout = "chests.json\nimages/000001.png\nmasks/000001.png\npretrain.csv\n{train,val,test}_list.txt"
        raise MissingData(
            "pocket chests", folder, layout, "companion.toy.datasets.chests.write(root, seed)", "none, drawn"
        )
    listed = folder / f"{split}_list.txt"
    try:
        lines = [line.split() for line in listed.read_text(encoding="utf-8").splitlines()]
        labels = torch.tensor([[int(value) for value in line[1:]] for line in lines])
    except (OSError, ValueError) as error:
        raise CorruptFile(listed, f"not a list of paths and labels ({error})") from error
    if labels.ndim != 2 or labels.shape[1] != len(FINDINGS):
        raise CorruptFile(listed, f"a line is not a path and {len(FINDINGS)} labels")
    texts = _rows(folder / ("pretrain.csv" if split == "train" else f"{split}_reports.csv"), "report", "llm_output")
    boxes_file = folder / f"{split}_boxes.csv"
    try:
        boxes = torch.tensor([ast.literal_eval(text)[0] for (text,) in _rows(boxes_file, "bbox")]).reshape(-1, 4)
    except (ValueError, SyntaxError, TypeError, RuntimeError) as error:
        raise CorruptFile(boxes_file, f"a box is not four numbers ({error})") from error
    grey = np.stack([read_image(folder / line[0]) for line in lines]).astype(np.float32) / 65535
    lesions = (
        np.stack([read_image(folder / path) for (path,) in _rows(folder / f"{split}_masks.csv", "mask_path")]) > 127
    )
    return Part(
        torch.from_numpy((grey - MEAN) / STD)[:, None],
        labels,
        torch.from_numpy(lesions.astype(np.float32))[:, None],
        boxes * SIZE // BOX_UNIT,
        tuple(report for report, _ in texts),
        tuple(said for _, said in texts),
    )


def _rows(path: Path, *columns: str) -> list[tuple[str, ...]]:
    """Columns of a table, one tuple per line."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [tuple(row[column] for column in columns) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise CorruptFile(path, f"not a table with {', '.join(columns)} ({error!r})") from error
    if not rows or any(value is None or "\0" in value for row in rows for value in row):
        raise CorruptFile(path, "a line is not whole")
    return rows
