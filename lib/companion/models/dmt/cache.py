"""What DMT's teachers say of every picture, kept on disk, so that epochs after the first cost the student alone.

    views = Views(pictures, augment, copies=4, seed=0)       # four fixed augmentations of each picture
    cache = build("cache", teachers, views)                  # asks the teachers; goes on where it was stopped
    fit.fit(DMT(student, teachers.widths), dmt.loss, Distilled(views, cache), ...)

Tokens are kept before they are normalised, one memory-mapped file a teacher, in the row `copy * pictures + picture`. At
paper size a picture takes 0.9 MB in float16 for three ViT-B (197 x 768 numbers each), ImageNet-1k 1.2 TB a copy.

A cache that was made with other teachers, pictures, augmentations or settings is refused; nothing of it is overwritten.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from ...errors import BadParameter, CompanionError, CorruptFile, MissingData
from ...ops.files import read_json, write_json
from ...ops.progress import progress
from ...training.fit import launcher
from .model import Teachers

DTYPES = ("float16", "float32")


class Views(Dataset):
    """Pictures under fixed random augmentations: view `copy * len(pictures) + i` is always the same.

    Args:
        pictures: (N, 3, H, W), or a data set whose items are pictures or begin with one.
        augment: from one to what the student and the teachers see; it draws from torch's generator. None: as it is.
        copies: augmentations of each picture.
        seed: of all of them.
    """

    def __init__(self, pictures: Tensor | Dataset, augment: Callable | None = None, copies: int = 1, seed: int = 0):
        if copies < 1:
            raise BadParameter("copies", copies, "1 or more")
        self.pictures, self.augment, self.copies, self.seed = pictures, augment, copies, seed

    def __len__(self) -> int:
        return len(self.pictures) * self.copies

    def __getitem__(self, row: int) -> Tensor:
        copy, index = divmod(row, len(self.pictures))
        if not 0 <= copy < self.copies:
            raise IndexError(row)
        seed = int(np.random.SeedSequence((self.seed, copy, index)).generate_state(1, np.uint64)[0] >> 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            item = self.pictures[index]
            picture = item[0] if isinstance(item, (tuple, list)) else item
            return picture if self.augment is None else self.augment(picture)

    def identity(self) -> str:
        """A hash of what the views are made of: all pictures when they are tensors, their paths when they have some
        (`sources` or `samples`), otherwise their number and the first and the last one."""
        augment = getattr(self.augment, "__qualname__", repr(self.augment))  # a function's repr has its address
        digest = hashlib.sha256(repr((len(self.pictures), augment, self.copies, self.seed)).encode())
        tensors = self.pictures if isinstance(self.pictures, Tensor) else getattr(self.pictures, "tensors", [None])[0]
        listed = getattr(self.pictures, "sources", getattr(self.pictures, "samples", None))
        if tensors is not None:
            digest.update(tensors.contiguous().cpu().numpy().tobytes())
        elif listed is not None and not isinstance(listed, np.ndarray):
            digest.update("\n".join(map(str, listed)).encode())
        else:
            for row in (0, len(self) - 1):
                digest.update(np.ascontiguousarray(self[row]).tobytes())
        return digest.hexdigest()


def teachers_identity(teachers: Teachers) -> dict[str, str]:
    """A hash of each teacher's tensors, and of what it is asked."""
    found = {}
    for name, model in teachers.models.items():
        sees = getattr(teachers.sees.get(name), "__qualname__", repr(teachers.sees.get(name)))
        heads = [block.attn.num_heads for block in model.blocks]
        digest = hashlib.sha256(repr((name, teachers.layer, sees, heads)).encode())
        for key, value in model.state_dict().items():
            digest.update(key.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
        found[name] = digest.hexdigest()
    return found


class Cache:
    """A finished cache: `cache[row]` is a list of K tensors (N, D_k), in the type they are stored in."""

    def __init__(self, folder: str | Path, settings: dict):
        self.folder, self.settings = Path(folder), settings
        self.rows, self.names = settings["rows"], tuple(settings["teachers"])
        self.maps = []
        for k, width in enumerate(settings["widths"]):
            path, shape = self.folder / f"{k}.npy", (self.rows, settings["tokens"], width)
            try:
                found = np.load(path, mmap_mode="c", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise CorruptFile(path, f"not the tokens of a teacher ({error})") from error
            if found.shape != shape or found.dtype != settings["dtype"]:
                raise CorruptFile(path, f"{found.shape} of {found.dtype}, expected {shape} of {settings['dtype']}")
            self.maps.append(found)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> list[Tensor]:
        return [torch.from_numpy(np.array(kept[row])) for kept in self.maps]

    def tensors(self) -> list[Tensor]:
        """All rows, (rows, N, D_k) each, still on disk: read where they are indexed."""
        return [torch.from_numpy(kept) for kept in self.maps]


class Distilled(Dataset):
    """Items (picture, tokens of teacher 1, ..., K) for `dmt.loss`: each epoch another of a picture's copies, by chance.

    Args:
        views, cache: as given to, and by, `build`.
    """

    def __init__(self, views: Views, cache: Cache):
        if len(views) != len(cache):
            raise BadParameter("cache", f"{len(cache)} rows", f"{len(views)}, one for each view")
        self.views, self.cache = views, cache

    def __len__(self) -> int:
        return len(self.views.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        copy = int(torch.randint(self.views.copies, ())) if self.views.copies > 1 else 0
        row = copy * len(self) + index
        return (self.views[row], *self.cache[row])


def in_memory(views: Views, cache: Cache) -> TensorDataset:
    """`Distilled` for small pictures of a single copy: `fit.fit` indexes it without a loader."""
    if views.copies != 1:
        raise BadParameter("copies", views.copies, "1: a tensor has one row a picture")
    return TensorDataset(torch.stack([views[i] for i in range(len(views))]), *cache.tensors())


def build(
    folder: str | Path,
    teachers: Teachers,
    views: Views,
    *,
    dtype: str = "float16",
    batch: int = 64,
    every: int = 20,
    workers: int = 0,
    accelerator: str = "auto",
    precision: str = "32-true",
) -> Cache:
    """The cache in `folder`: opened when it is there, otherwise made, or finished from where it was stopped.

    Args:
        teachers: with the whole picture as their view: others depend on what the student sees.
        dtype: that tokens are stored in, float16 or float32.
        batch: pictures that the teachers are asked about at once.
        every: batches after which what was done is noted.
        workers: processes that load pictures. accelerator, precision: as in `fit.fit`.

    Raises:
        BadParameter: another view or type, or a cache of other teachers, pictures or settings: it says which.
        CompanionError: not enough room on the disk, or numbers that the type cannot hold.
        CorruptFile: a file of the cache cannot be read.
    """
    if teachers.view != "full":
        raise BadParameter("teacher_view", teachers.view, "'full': what a teacher says of a random part changes anew")
    if dtype not in DTYPES:
        raise BadParameter("dtype", dtype, DTYPES)
    folder, first = Path(folder), views[0][None]
    vit = next(iter(teachers.models.values()))
    tokens = 1 + (first.shape[-2] // vit.patch) * (first.shape[-1] // vit.patch)
    settings = {
        "rows": len(views),
        "tokens": tokens,
        "widths": list(teachers.widths),
        "dtype": dtype,
        "pictures": views.identity(),
        "teachers": teachers_identity(teachers),
    }
    if (folder / "cache.json").is_file():
        _check(folder / "cache.json", settings)
        return Cache(folder, settings)
    done = _start(folder, settings)

    kept = [np.lib.format.open_memmap(folder / f"{k}.part", mode="r+") for k in range(len(settings["widths"]))]
    fabric = launcher(accelerator=accelerator, devices=1, precision=precision)
    asked = fabric.setup_module(teachers)
    stream = DataLoader(Subset(views, range(done, len(views))), batch, num_workers=workers)
    for number, pictures in enumerate(progress(stream, "teachers", len(stream)), 1):
        for name, array, said in zip(teachers.names, kept, asked(pictures.to(fabric.device)).tokens, strict=True):
            said = said.float().cpu()
            if not said.isfinite().all() or said.abs().max() > np.finfo(dtype).max:
                raise CompanionError(f"{name} says numbers that {dtype} cannot hold: dtype = 'float32'")
            array[done : done + len(said)] = said.numpy()
        done += len(pictures)
        if number % every == 0:
            _note(folder, settings, kept, done)
    _note(folder, settings, kept, done)
    del kept
    for k in range(len(settings["widths"])):
        (folder / f"{k}.part").replace(folder / f"{k}.npy")
    write_json(folder / "cache.json", settings)
    (folder / "progress.json").unlink()
    teachers.to("cpu")
    return Cache(folder, settings)


def load(folder: str | Path, teachers: Teachers | None = None) -> Cache:
    """A finished cache; with `teachers` it is checked that they are those it was made with.

    Raises:
        MissingData: there is none, or it is not finished.
        BadParameter: it is of other teachers.
    """
    path = Path(folder) / "cache.json"
    if not path.is_file():
        layout = "cache.json    settings\n<k>.npy       tokens of teacher k, (rows, tokens, width)"
        detail = "it was not finished: `build` goes on" if (Path(folder) / "progress.json").is_file() else ""
        raise MissingData(
            "cached teachers",
            folder,
            layout,
            "`dmt_cache.build`, which asks the teachers",
            "that of the pictures and the teachers",
            detail,
        )
    settings = read_json(path)
    if not isinstance(settings, dict) or not {"rows", "tokens", "widths", "dtype", "teachers"} <= settings.keys():
        raise CorruptFile(path, "not the settings of cached teachers")
    if teachers is not None:
        _check(path, {"teachers": teachers_identity(teachers)})
    return Cache(folder, settings)


def size(rows: int, tokens: int, widths: Sequence[int], dtype: str = "float16") -> int:
    """The bytes that a cache takes."""
    return rows * tokens * sum(widths) * np.dtype(dtype).itemsize


def _check(path: Path, settings: dict) -> dict:
    """What the file says, when it agrees with `settings`."""
    written = read_json(path)
    if not isinstance(written, dict):
        raise CorruptFile(path, "not the settings of cached teachers")
    for key, value in settings.items():
        if written.get(key) != value:
            other = f"{written.get(key)!r}, as in the cache that is there ({path.parent}); or another folder"
            raise BadParameter(f"cache, {key}", value, other)
    return written


def _start(folder: Path, settings: dict) -> int:
    """How many rows are there already; files for all of them are made when there are none."""
    note = folder / "progress.json"
    if note.is_file():
        written = _check(note, settings)
        parts = zip(range(len(settings["widths"])), settings["widths"], strict=True)
        for k, width in parts:
            # a stop between the last rename and the last note leaves finished names
            if (finished := folder / f"{k}.npy").is_file():
                finished.replace(folder / f"{k}.part")
            try:
                shape = np.lib.format.open_memmap(folder / f"{k}.part", mode="r").shape
            except (OSError, ValueError) as error:
                raise CorruptFile(folder / f"{k}.part", f"not the tokens of a teacher ({error})") from error
            if shape != (settings["rows"], settings["tokens"], width):
                raise CorruptFile(folder / f"{k}.part", f"{shape}, another shape than it was made with")
        return int(written["done"])
    folder.mkdir(parents=True, exist_ok=True)
    needed = size(settings["rows"], settings["tokens"], settings["widths"], settings["dtype"])
    if needed > (free := shutil.disk_usage(folder).free):
        room = f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in {folder}"
        raise CompanionError(f"the teachers' tokens take {room}")
    for k, width in enumerate(settings["widths"]):
        shape = (settings["rows"], settings["tokens"], width)
        path = folder / f"{k}.part"
        np.lib.format.open_memmap(path, mode="w+", dtype=settings["dtype"], shape=shape)
        if hasattr(os, "posix_fallocate"):  # or a disk that fills up would end the process, not raise an error
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    write_json(note, settings | {"done": 0})
    return 0


def _note(folder: Path, settings: dict, kept: Sequence[np.memmap], done: int) -> None:
    """Rows first, then how many there are: a stop in between repeats some."""
    for array in kept:
        array.flush()
    write_json(folder / "progress.json", settings | {"done": done})
