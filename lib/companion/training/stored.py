"""Results of long passes over a data set, on disk as they come: a killed run computes only what was not saved.

rows = saved(folder, len(test), predictions)    # any result of each item, `EVERY` of them in a file
fill(folder, len(images), outputs)              # arrays with a row for each item, memory-mapped files
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from ..errors import CompanionError, CorruptFile, Count, Whole, typed
from ..io.files import atomic, read_json, write_json

EVERY = 128  # results in a file of `saved`: a multiple of the batches of tests, which a resumed one then has too
FLUSHED = 60  # seconds between two records of the rows that `fill` has written
NOTE = "cache.json"


def saved(folder: Path | None, count: Whole, compute: Callable[[int], Iterable[Any]]) -> Iterator[Any]:
    """Yield the results of `count` items: those in `folder` are read, the others are computed and saved there.

    Args:
        folder: its name must identify all that the results depend on. None: nothing is saved.
        compute: from a number of items to the results of those after them, in order: tensors and plain Python values.

    Raises `CorruptFile`: a file in `folder` that cannot be read.
    """
    done, part = 0, list[Any]()
    while folder and done < count and (path := folder / f"{done}.pt").is_file():
        try:
            part = torch.load(path, map_location="cpu", weights_only=True)
            complete = len(part) == min(EVERY, count - done)
        except Exception as error:  # a damaged file can raise anything
            raise CorruptFile(path, f"no results ({type(error).__name__}); delete it to compute them again") from error
        if not complete:
            raise CorruptFile(path, f"the results of {len(part)} items; delete it to compute them again")
        yield from part
        done += len(part)
    part = []
    for result in compute(done):
        part.append(result)
        if len(part) == EVERY or done + len(part) == count:
            if folder:
                with atomic(folder / f"{done}.pt") as temporary:
                    torch.save(part, temporary)
            done, part = done + len(part), []
        yield result
    if done + len(part) != count:
        raise CompanionError(f"results of {done + len(part)} items are there, and {count} were to be stored")


@typed
def fill(
    folder: Path,
    count: Whole,
    compute: Callable[[int], Iterable[Sequence[Tensor]]],
    *,
    arrays: Count = 1,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write arrays of `count` rows, the files 0.npy, 1.npy, ... of `folder`; only rows that lack are computed.

    `cache.json` has the number of rows on disk, written every `FLUSHED` seconds and at the end.

    Args:
        folder: its name must identify all that the rows depend on, unless the caller compares the facts.
        compute: from a number of rows to batches of those after them, in order, on the CPU: a tensor for each array.
        facts: written to `cache.json`.

    Raises:
        CompanionError: not enough disk space, or not `count` rows.
        CorruptFile: an array that cannot be read.
    """
    note, since = folder / NOTE, time.monotonic()
    start = done = read_json(note).get("done", 0) if note.is_file() else 0
    files = [open_memmap(str(file.filename), "r+") for file in opened(folder, arrays)] if done else []
    for batch in compute(done) if done < count else ():
        if done == start:  # a full disk ends a process that maps a file, without a message
            folder.mkdir(parents=True, exist_ok=True)
            needed, free = (count - done) * sum(rows[0].nbytes for rows in batch), shutil.disk_usage(folder).free
            if needed > free:
                raise CompanionError(f"{needed / 1e9:.1f} GB are to be stored; {free / 1e9:.1f} are free in {folder}")
        if not files:
            for k, rows in enumerate(batch):
                shape, dtype = (count, *rows.shape[1:]), rows.numpy().dtype
                files.append(open_memmap(folder / f"{k}.npy", mode="w+", dtype=dtype, shape=shape))
        for file, rows in zip(files, batch, strict=True):
            file[done : done + len(rows)].reshape(rows.shape)[:] = rows.numpy()  # not broadcast
        done += len(batch[0])
        if done == count or time.monotonic() - since >= FLUSHED:
            for file in files:
                file.flush()
            write_json(note, {**facts, "done": done})
            since = time.monotonic()
    if done != count:
        raise CompanionError(f"results of {done} items are there, and {count} were to be stored")


def opened(folder: Path, arrays: int) -> list[np.memmap]:
    """The arrays of `fill`, which changes do not reach. Raises `CorruptFile`: one cannot be read."""
    found = []
    for path in (folder / f"{k}.npy" for k in range(arrays)):
        try:
            found.append(open_memmap(path, "c"))  # "r+" would lengthen a truncated file
        except (OSError, ValueError) as error:
            raise CorruptFile(path, f"not the array of a run ({error}); delete {path.parent}") from error
    return found
