"""Progress display: a bar in interactive use, occasional lines in a batch log, nothing in tests.

The environment variable `COMPANION_PROGRESS` chooses: "bar", "lines" or "off". The default is "bar" in a terminal and
in a Jupyter kernel, "lines" where the output goes to a file or a pipe.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm.auto import tqdm

from ..errors import check_choice

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 20.0


def progress(items: Iterable[T], text: str, total: int | None = None, done: int = 0) -> Iterator[T]:
    """Yield `items` and show progress. `done` of `total` were finished before (a resumed run).

    Raises `BadParameter`: `COMPANION_PROGRESS` has another value than "bar", "lines" or "off".
    """
    mode = os.environ.get("COMPANION_PROGRESS", "bar" if _interactive() else "lines")
    check_choice("COMPANION_PROGRESS", mode, ("bar", "lines", "off"))
    if total is None and isinstance(items, Sized):
        total = done + len(items)
    if mode == "off":
        yield from items
    elif mode == "bar":
        # on stdout: a notebook displays stderr as an error
        yield from tqdm(items, desc=text, total=total, initial=done, leave=False, file=sys.stdout)
    else:
        start = last = time.monotonic()
        for count, item in enumerate(items, done + 1):
            yield item
            now = time.monotonic()
            if now - last >= SECONDS_BETWEEN_LINES:
                last = now
                left = f", about {(now - start) / (count - done) * (total - count):.0f} s left" if total else ""
                print(f"{text}: {count}{f' of {total}' if total else ''}{left}", flush=True)


def _interactive() -> bool:
    """Whether the output is a terminal or that of a Jupyter kernel, which is none."""
    return sys.stdout.isatty() or any(kind.__module__ == "ipykernel.iostream" for kind in type(sys.stdout).__mro__)
