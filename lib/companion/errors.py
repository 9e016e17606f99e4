"""The exceptions that users see; each message names the remedy."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Sequence
from pathlib import Path


class CompanionError(Exception):
    """Base class of all exceptions of this package."""


class MissingData(CompanionError):
    """A data set is missing or incomplete in the searched folder.

    Args:
        name: the data set's display name.
        folder: the folder that was expected to hold it.
        layout: the expected files, one per line.
        source: where to get it.
        licence: its licence, or the access conditions.
        detail: what exactly is missing, if only a part is.
        there: what is there instead.
        archive: the archive that is wanted, by name and number of files.
    """

    def __init__(
        self,
        name: str,
        folder: str | Path,
        layout: str,
        source: str,
        licence: str,
        detail: str = "",
        there: str = "",
        archive: str = "",
    ):
        self.name, self.folder, self.layout = name, Path(folder), layout
        self.source, self.licence, self.detail = source, licence, detail
        tree = "\n".join("    " + line for line in layout.strip().splitlines())
        what = f"\n  missing : {detail}" if detail else ""
        what += f"\n  there   : {there}" if there else ""
        wanted = f"\n  archive : {archive}" if archive else ""
        how = "is not complete" if detail and self.folder.is_dir() else "was not found"
        super().__init__(
            f"the data set '{name}' {how}\n  expected: {folder}{what}\n  layout  :\n{tree}{wanted}\n"
            f"  get it  : {source}\n  licence : {licence}"
        )


class MissingWeights(CompanionError):
    """Pretrained weights are neither cached nor allowed to be downloaded.

    Args:
        name: the model's name on its hub.
        cache: the folder that was searched.
        ways: the ways to get the weights, one sentence each.
        reason: why the download failed, if it was attempted.
    """

    def __init__(self, name: str, cache: str | Path, ways: Iterable[str], reason: str = ""):
        self.name, self.cache, self.ways, self.reason = name, Path(cache), tuple(ways), reason
        steps = "\n".join(f"  {i}. {way}" for i, way in enumerate(self.ways, 1))
        tried = f", and {reason}" if reason else ""
        super().__init__(f"the weights of '{name}' are not in the cache ({cache}){tried}. To get them:\n{steps}")


class CorruptFile(CompanionError):
    """A file exists but cannot be read in the expected format; what it is instead is said where that is known."""

    def __init__(self, path: str | Path, reason: str):
        self.path, self.reason = Path(path), reason + (f". {found}" if (found := _what_it_is(Path(path))) else "")
        super().__init__(f"cannot read {path}: {self.reason}")


def _what_it_is(path: Path) -> str:
    """What a file is that downloads leave in place of data, and what to do; else nothing."""
    try:
        with path.open("rb") as file:
            start = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    except OSError:
        return ""
    if not path.stat().st_size:
        return "The file is empty: get it again"
    if start.startswith(b"version https://git-lfs"):
        return "It is a Git LFS pointer, not the file: run `git lfs pull` in its repository"
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")) and path.suffix.lower() not in (".html", ".xml"):
        return "It is a web page, such as a host's login or quota message: download the file again in a browser"
    return ""


class CannotWrite(CompanionError, OSError):
    """The disk or the user's quota is full. Existing files are unchanged; no partial file remains."""

    def __init__(self, path: str | Path, free: int):
        self.path, self.free = Path(path), free
        super().__init__(
            f"cannot write {path}: no space is left ({free / 1e6:.1f} MB free). Make room, or choose another folder; "
            "what was there before is untouched, and a run that can be resumed continues from it"
        )

    def __str__(self) -> str:
        return str(self.args[0])


class BadCheckpoint(CompanionError):
    """A state dict does not match the model; missing, unknown and misshapen tensors are listed."""

    def __init__(self, what: str, missing: Iterable[str] = (), unknown: Iterable[str] = (), shapes: Iterable[str] = ()):
        self.missing, self.unknown, self.shapes = sorted(missing), sorted(unknown), sorted(shapes)
        lines = [f"the checkpoint does not fit {what}"]
        for title, names in (("missing", self.missing), ("unknown", self.unknown), ("other shape", self.shapes)):
            if names:
                more = f" (and {len(names) - 12} more)" if len(names) > 12 else ""
                lines.append(f"  {title}: " + ", ".join(names[:12]) + more)
        super().__init__("\n".join(lines))


class BadParameter(CompanionError, ValueError):
    """A parameter has a value that is not accepted; the message lists the accepted ones, the most similar first."""

    def __init__(self, name: str, value: object, accepted: object):
        self.name, self.value, self.accepted = name, value, accepted
        if isinstance(accepted, (list, tuple, set, frozenset)):
            accepted = ", ".join(repr(choice) for choice in _nearest_first(value, list(accepted)))
        super().__init__(f"{name} = {value!r} is not accepted. Accepted: {accepted}")


def check_choice(name: str, value: object, choices: Iterable) -> None:
    """Raise `BadParameter` unless `value` is one of `choices` (of a dict, its keys)."""
    if value not in choices:
        raise BadParameter(name, value, tuple(choices))


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise `BadParameter` unless `value` is a finite number, and `low` <= `value` <= `high`."""
    if not isinstance(value, numbers.Real) or not low <= value <= high or math.isinf(value):  # NaN too
        raise BadParameter(name, value, f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}")


def check_names(names: Iterable, count: int | None = None) -> None:
    """Raise `BadParameter` unless `names` are different class names: none, or `count` where that is known."""
    if isinstance(names, str):
        raise BadParameter("class_names", names, "a list of names: this is one text")
    found = [str(name) for name in names]
    if twice := [name for name in dict.fromkeys(found) if found.count(name) > 1]:
        raise BadParameter("class_names", found, f"a different name for each class: {twice[0]!r} is there twice")
    if found and count is not None and len(found) != count:
        raise BadParameter("class_names", f"{len(found)} names", f"{count}, one for each output")


def _nearest_first(value: object, choices: Sequence[object]) -> Sequence[object]:
    """The choices; if there are more than eight, those similar to `value` come first."""
    if len(choices) <= 8:
        return choices
    by_text = {str(choice): choice for choice in choices}
    near = [text for text in by_text if text.rpartition("/")[2] == str(value).rpartition("/")[2]]
    near += difflib.get_close_matches(str(value), by_text, n=4, cutoff=0.5)
    return [by_text[text] for text in dict.fromkeys([*near, *by_text])]
