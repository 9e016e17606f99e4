"""Helpers of the readers' tests: refusals, flat images, sets of other sizes, a local web server."""

import dataclasses
import http.server
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from companion.data import DATASETS
from companion.errors import CorruptFile


def refused(error: type[Exception], words: str, call: Callable, /, *args: object, **options: object) -> None:
    """The call raises `error`, and its message matches `words`."""
    with pytest.raises(error, match=words):
        call(*args, **options)


def picture(path: Path, value: int | tuple = 100, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> None:
    """A flat image of brightness `value`, by which a test recognises it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (value,) * 3 if mode == "RGB" and isinstance(value, int) else value).save(path)


def values(images) -> list[int]:
    """The brightness of each image: which file it came from (JPEG keeps a flat grey)."""
    return [int(np.asarray(images.picture(i))[0, 0, 0]) for i in range(len(images))]


def items(images) -> list[tuple[int, int]]:
    """The brightness and the label of each image."""
    return [(value, int(label)) for value, label in zip(values(images), images.labels, strict=True)]


def unreadable(file: Path, call: Callable, contents: dict[str | bytes, str]) -> None:
    """With each content of `file` the call raises a `CorruptFile` of it that names a value."""
    for content, value in contents.items():
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(CorruptFile) as error:
            call()
        assert error.value.path == file and value in str(error.value), content


def expect(monkeypatch: pytest.MonkeyPatch, name: str, **changes) -> None:
    """Apply `changes`, such as other `sizes`, to the set `name` of the register."""
    monkeypatch.setitem(DATASETS, name, dataclasses.replace(DATASETS[name], **changes))


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder, and the address at which a web server on this machine hands it out."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
