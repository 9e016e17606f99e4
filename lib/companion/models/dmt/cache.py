"""The tokens of DMT's teachers for every image, on disk, so that later epochs run the student alone.

    views = Views(images, augment, seed=0)                   # one fixed augmentation of each image
    cache = build("cache", teachers, views)                  # runs the teachers; resumes where it was stopped
    fit(DMT(student, teachers.widths), loss, Distilled(views, cache), ...)

Tokens are stored before they are normalised, one memory-mapped file per teacher; cache.json has the number of finished
images. At paper size an image takes 0.9 MB in float16 for three ViT-B (197 x 768 values each), ImageNet-1k 1.2 TB.

A cache of other teachers, images, augmentations or settings is refused and not overwritten.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ...errors import BadParameter, CompanionError, CorruptFile, check_choice
from ...ops.files import read_json, write_json
from ...ops.progress import progress
from ...training.checkpoints import checkpoint_key
from ...training.fit import AUTO, Hardware, evaluating
from .model import Teachers

DTYPES = ("float16", "float32")


class Views(Dataset):
    """Images under a random augmentation that is always the same for an image.

    Args:
        images: (N, 3, H, W), or a dataset whose items are images or begin with one.
        augment: from an image to the input of student and teachers; it draws from torch's generator. None: unchanged.
        seed: of the augmentations.
    """

    def __init__(self, images: Tensor | Dataset, augment: Callable | None = None, seed: int = 0):
        self.images, self.augment, self.seed = images, augment, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        seed = int(np.random.SeedSequence((self.seed, index)).generate_state(1, np.uint64)[0] >> 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            item = self.images[index]
            image = item[0] if isinstance(item, (tuple, list)) else item
            return image if self.augment is None else self.augment(image)

    def key(self) -> str:
        """A hash of the views' source: of all images when they are tensors, of their paths when they have some
        (`sources` or `samples`), otherwise of their number and of the first and the last view."""
        content = self.images if isinstance(self.images, Tensor) else getattr(self.images, "tensors", [None])[0]
        if content is None:
            listed: Any = getattr(self.images, "sources", getattr(self.images, "samples", None))
            known = listed is not None and not isinstance(listed, np.ndarray)
            content = [str(path) for path in listed] if known else [self[0], self[len(self) - 1]]
        # a function's repr contains its address
        augment = getattr(self.augment, "__qualname__", repr(self.augment))
        return checkpoint_key(images=len(self.images), augment=augment, seed=self.seed, content=content)


class Cache:
    """A finished cache: `cache[row]` is a list of K tensors (N, D_k), in the dtype they are stored in."""

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]):
        self.folder, self.settings = Path(folder), dict(settings)
        self.rows, self.names = settings["rows"], tuple(settings["teachers"])
        self.maps = _files(self.folder, settings, "c")

    def __reduce__(self) -> tuple:
        return Cache, (self.folder, self.settings)  # a loader's process opens the files itself

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> list[Tensor]:
        return [torch.from_numpy(np.array(tokens[row])) for tokens in self.maps]

    def tensors(self) -> list[Tensor]:
        """All rows, (rows, N, D_k) each, still on disk: read where they are indexed."""
        return [torch.from_numpy(tokens) for tokens in self.maps]


class Distilled(Dataset):
    """Items (image, tokens of teacher 1, ..., K) for `model.loss`.

    Args:
        views, cache: as given to, and by, `build`.
    """

    def __init__(self, views: Views, cache: Cache):
        if len(views) != len(cache):
            raise BadParameter("cache", f"{len(cache)} rows", f"{len(views)}, one for each view")
        self.views, self.cache = views, cache

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return (self.views[index], *self.cache[index])


def build(
    folder: str | Path,
    teachers: Teachers,
    views: Views,
    *,
    dtype: str = "float16",
    batch: int = 64,
    every: int = 20,
    hardware: Hardware = AUTO,
) -> Cache:
    """The cache in `folder`: opened if it exists, otherwise built or resumed.

    Args:
        teachers: with the whole image as their view: others depend on the student's masks.
        dtype: of the stored tokens, float16 or float32.
        batch: images that go through the teachers at once.
        every: batches after which the progress is written.
        hardware: as in `fit`, of one device.

    Raises:
        BadParameter: another view or dtype, or a cache of other teachers, images or settings, which are named.
        CompanionError: not enough disk space, or values outside the range of the dtype.
        CorruptFile: a file of the cache cannot be read.
    """
    if teachers.view != "full":
        raise BadParameter("teacher_view", teachers.view, "'full': tokens of a random part differ each time")
    check_choice("dtype", dtype, DTYPES)
    folder, (height, width), side = Path(folder), views[0].shape[-2:], next(iter(teachers.models.values())).patch
    settings = {
        "rows": len(views),
        "tokens": 1 + (height // side) * (width // side),
        "widths": list(teachers.widths),
        "dtype": dtype,
        "images": views.key(),
        "teachers": {name: _key(model) for name, model in teachers.models.items()},
    }
    done = _done(folder, settings)
    if done == len(views):
        return Cache(folder, settings)
    files, remaining = _files(folder, settings, "r+"), Subset(views, range(done, len(views)))
    with evaluating(hardware, teachers) as device:
        stream = DataLoader(remaining, batch, num_workers=hardware.workers, pin_memory=device.type == "cuda")
        for number, images in enumerate(progress(stream, "teachers", len(stream)), 1):
            outputs = teachers(images.to(device, non_blocking=True)).tokens
            for name, file, output in zip(teachers.names, files, outputs, strict=True):
                output = output.float().cpu()
                if not output.isfinite().all() or output.abs().max() > np.finfo(dtype).max:
                    raise CompanionError(f"{name} returns values that {dtype} cannot hold: dtype = 'float32'")
                file[done : done + len(output)] = output.numpy()
            done += len(images)
            if number % every == 0 or done == len(views):
                for file in files:  # rows first, then their number: after a kill in between some are recomputed
                    file.flush()
                write_json(folder / "cache.json", settings | {"done": done})
    return Cache(folder, settings)


def size(rows: int, tokens: int, widths: Sequence[int], dtype: str = "float16") -> int:
    """The size of a cache in bytes."""
    return rows * tokens * sum(widths) * np.dtype(dtype).itemsize


def _key(teacher: Any) -> str:
    """A hash of a teacher: of its tensors, and of the number of heads of its blocks."""
    return checkpoint_key(model=teacher, heads=[block.attn.num_heads for block in teacher.blocks])


def _files(folder: Path, settings: Mapping[str, Any], mode: Any) -> list[np.memmap]:
    """The teachers' files, memory-mapped."""
    found = []
    for k, width in enumerate(settings["widths"]):
        path, shape = folder / f"{k}.npy", (settings["rows"], settings["tokens"], width)
        try:
            tokens = np.load(path, mmap_mode=mode, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CorruptFile(path, f"not the tokens of a teacher ({error})") from error
        if tokens.shape != shape or tokens.dtype != settings["dtype"]:
            raise CorruptFile(path, f"{tokens.shape} of {tokens.dtype}, expected {shape} of {settings['dtype']}")
        found.append(tokens)
    return found


def _done(folder: Path, settings: Mapping[str, Any]) -> int:
    """The number of finished rows of the cache in `folder`; its files are made when there is none."""
    note = folder / "cache.json"
    if note.is_file():
        written = read_json(note)
        if not isinstance(written, dict):
            raise CorruptFile(note, "not the settings of cached teachers")
        for key, value in settings.items():
            if written.get(key) != value:
                other = f"{written.get(key)!r}, as in the cache that is there ({folder}); or another folder"
                raise BadParameter(f"cache, {key}", value, other)
        return int(written.get("done", settings["rows"]))  # files of earlier versions, of finished caches, lack it
    folder.mkdir(parents=True, exist_ok=True)
    needed = size(settings["rows"], settings["tokens"], settings["widths"], settings["dtype"])
    if needed > (free := shutil.disk_usage(folder).free):
        raise CompanionError(f"the teachers' tokens take {needed / 1e9:.1f} GB; {free / 1e9:.1f} are free in {folder}")
    for k, width in enumerate(settings["widths"]):
        shape = (settings["rows"], settings["tokens"], width)
        np.lib.format.open_memmap(folder / f"{k}.npy", mode="w+", dtype=settings["dtype"], shape=shape)
    write_json(note, {**settings, "done": 0})
    return 0
