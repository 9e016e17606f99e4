"""Whole slides with a grade each: PANDA, or your own folder.

    items = load("slides/panda", "data")                          # every slide of train.csv, no image is opened
    write_folds("slides/panda", "data", test=0.2)                 # once: five folds, stratified by grade
    train = load("slides/panda", "data", "train", fold=0)
    data = Features(train, "features")                            # by `companion slides`

slides_sets.yaml describes the sets. `pyramids` reads the pixels; here only `Features`, which reads HDF5, needs the
extra `slides`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ..errors import BadParameter, CorruptFile, Count, MissingData, Range, Whole, check_choice, extra, typed
from ..io.files import atomic, atomic_folder, sha256
from . import DataSet, Parts, find, own_set, tables
from .folders import HIDDEN, at, doubled, entries

SPLITS = ("train", "tune", "test")
GRADES = 6
SUFFIXES = (".tiff", ".tif", ".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".dcm")
_UNKNOWN = ("", "nan", "na", "n/a", "none", "null", "unknown")  # how tables write that a cell has no value
_COLUMNS = ("image_id", "data_provider", "isup_grade", "gleason_score")


@dataclasses.dataclass(frozen=True)
class Item:
    """One slide.

    Attributes:
        name: its id, the name of its file without the ending.
        path: the pyramid.
        grade: the class, from 0.
        provider: the scanning institution; empty if unknown.
        patient: whose slide it is; empty if unknown.
        label: the class as written in your own folder; empty in the public sets.
    """

    name: str
    path: Path
    grade: int
    provider: str = ""
    patient: str = ""
    label: str = ""


@typed
def load(
    name: str, root: str | Path, split: str = "all", fold: Whole = 0, every: Sequence[Item] | None = None
) -> list[Item]:
    """The slides of one split, in the order of its list. No image is opened.

    Args:
        name: "slides/panda".
        root: the data folder.
        split: "all" for every slide of train.csv, or "train", "tune", "test" of a fold.
        fold: number of the fold.
        every: the slides of train.csv from an earlier call, which then is not read again: for the lists of many folds.

    Raises:
        BadParameter: unknown name or split.
        MissingData: the table, a fold's list or a listed slide is missing.
        CorruptFile: a table without its columns, an invalid grade, a duplicate name; file and line are named.
    """
    dataset = find(name, "slides")
    check_choice("split", split, ("all", *SPLITS))
    known = {item.name: item for item in (_table(dataset, Path(root)) if every is None else every)}
    if split == "all":
        return [*known.values()]
    path = dataset.folder(root) / "folds" / f"fold-{fold}" / f"{split}.csv"
    if not path.is_file():
        how = f'write_folds("{name}", "{root}", test=0.2)'  # with a share of 0 there is no list of test slides
        raise dataset.missing(root, f"no list {path}; `companion.data.slides.{how}` makes five folds with all lists")
    items = []
    for line, row in _rows(path, "slide_id", "isup_grade"):
        if row["slide_id"] not in known:
            raise CorruptFile(path, f"line {line}: {row['slide_id']!r} is in no line of train.csv")
        grade = _grade(path, line, row["isup_grade"], dataset.classes)
        items.append(dataclasses.replace(known[row["slide_id"]], grade=grade))
    return items


@typed
def own(root: str | Path) -> dict[str, list[Item]]:
    """Your own slides, see `companion.data`: "train", all of them by name, in one folder per class, or in one folder
    with a table; `split_folds` splits them.

    Args:
        root: the folder; any format that openslide reads. Its table `labels.csv` has `slide_id` (the file's name, with
            or without its ending) and `label`. Classes are grades from 0 to 5, all counted even if some have no slide;
            or 0, 1, 2, ... without a gap; or names, numbered in sorted order. A column `patient` keeps a patient's
            slides in one part of a split, see `split_folds`.

    Raises:
        MissingData: there is no folder, no slide in it, or a slide in the table is missing; one class, or none.
        CorruptFile: a table without its columns, with a duplicate name, with an invalid class, or with a patient for
            some slides only; the mask of a slide, `<name>_mask`, in another class; a slide next to the class folders.
    """
    own_set(root, "slides", "")
    path = Path(root)
    files, source = unlabelled(path), at(path, "labels.csv")
    if source.is_file():
        found = []
        for line, row in _rows(source, "slide_id", "label"):
            name, label = _stem(row["slide_id"], files), row["label"].strip()
            patient = row.get("patient", "all").strip()
            if name not in files:
                raise _missing(path, f"the slide {name!r} of {source}, line {line}")
            if label.lower() in _UNKNOWN:
                raise CorruptFile(source, f"line {line}: the slide {name!r} has no class ({label!r}): leave it out")
            if patient.lower() in _UNKNOWN:
                raise CorruptFile(source, f"line {line}: the slide {name!r} has no patient: fill or drop the column")
            found.append((name, label, patient if "patient" in row else ""))
    else:
        source = path
        inner = {name: file.relative_to(path).parts for name, file in files.items()}
        if bare := [files[name] for name, parts in inner.items() if len(parts) == 1]:
            raise _missing(path, f"no labels.csv, and {bare[0]} is in no folder of a class")
        found = [(name, parts[0], "") for name, parts in inner.items()]
    if len({label for _, label, _ in found}) < 2:
        raise _missing(path, f"one class, {found[0][1]!r}: two or more are needed")
    if twice := doubled(name for name, *_ in found):
        raise CorruptFile(source, f"the slide {twice[0]!r} is there twice")
    label_of = {name: label for name, label, _ in found}
    if masks := [name for name in label_of if label_of.get(f"{name}_mask", label_of[name]) != label_of[name]]:
        what = f"a mask of {masks[0]}, not a slide of the class {label_of[f'{masks[0]}_mask']!r}: move it out of {path}"
        raise CorruptFile(files[f"{masks[0]}_mask"], what)
    numbers = _numbered(source, sorted({*label_of.values()}))
    found.sort()
    items = (Item(name, files[name], numbers[label], patient=patient, label=label) for name, label, patient in found)
    return {"train": [*items]}


def _stem(name: str, files: Collection[str]) -> str:
    """The name of a slide in a table, which may have the ending of its file."""
    return name if name in files else Path(name).stem


def unlabelled(path: str | Path) -> dict[str, Path]:
    """The slides in your own folder, at any depth, by name, without classes.

    Raises:
        MissingData: there is no folder, or no slide in it.
        CorruptFile: two slides of one name.
    """
    path = Path(path)
    if not path.is_dir():
        raise _missing(path, "no such folder")
    found: dict[str, Path] = {}
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in SUFFIXES and not HIDDEN.search(f"/{file.relative_to(path)}"):
            if file.stem in found:
                raise CorruptFile(path, f"{found[file.stem]} and {file} have one name: the slide is there twice")
            found[file.stem] = file
    if not found:
        raise _missing(path, f"no slide: no file that ends in {', '.join(SUFFIXES)}")
    return found


def spacings(path: str | Path, slides: Collection[str]) -> dict[str, float]:
    """Microns per pixel of level 0 by slide, of a CSV with `slide_id`, as in `own`, and `mpp`.

    Raises `CorruptFile`: a table without its columns, a slide that is none of `slides` or there twice, no number above
    0; file and line are named.
    """
    found: dict[str, float] = {}
    for line, row in _rows(Path(path), "slide_id", "mpp"):
        name = _stem(row["slide_id"], slides)
        if name not in slides or name in found:
            wrong = "there twice" if name in found else "none of the slides"
            raise CorruptFile(path, f"line {line}: {row['slide_id']!r} is {wrong}")
        with contextlib.suppress(ValueError):
            found[name] = float(row["mpp"])
        if not 0 < found.get(name, math.nan) < math.inf:
            raise CorruptFile(path, f"line {line}: mpp is {row['mpp']!r}, microns per pixel above 0 are expected")
    return found


def _missing(path: Path, detail: str) -> MissingData:
    table = "labels.csv         slide_id,label; and patient, where patients have several slides"
    layout = f"{table}\n<slide_id>.tiff    or .svs, .ndpi, ...\nor <class>/<slide>.tiff"
    return MissingData("slides of one's own", path, layout, "your slides", "yours", detail)


def _numbered(source: Path, classes: Sequence[str]) -> dict[str, int]:
    """The number of each class: the rank of a name, or the number itself, which must be a grade or without a gap."""
    numbers = {}
    for label in classes:
        with contextlib.suppress(ValueError):
            numbers[label] = float(label)
    if not numbers:
        return {label: i for i, label in enumerate(classes)}
    values = set(numbers.values())
    if len(numbers) < len(classes) or not values <= {*range(max(GRADES, len(values)))}:
        wanted = f"grades from 0 to {GRADES - 1}, 0, 1, 2, ... without a gap, or names are expected"
        raise CorruptFile(source, f"the classes are {', '.join(classes[:12])}: {wanted}")
    return {label: int(number) for label, number in numbers.items()}


@typed
def split_folds(
    items: Sequence[Item],
    folds: Annotated[int, Range(2)] = 5,
    test: Annotated[float, Range(0, 1, "[)")] = 0.0,
    seed: Whole = 0,
) -> list[dict[str, list[Item]]]:
    """Folds stratified by grade and provider; all slides of a known patient are in the same part.

    Args:
        folds: their number; each has a different tuning share and trains on the rest.
        test: share used by no fold for training or tuning, the same for all: the nearest of 1/2, 1/3, ..., or 0.

    Returns:
        For each fold its "train", "tune" and "test" slides.

    Slides of fewer than `folds` in every grade are split at random.

    Raises `BadParameter`: a slide twice; fewer slides than folds; fewer patients, or slides of the most frequent grade
    if patients are known.
    """
    from sklearn import model_selection  # here: it takes a second to import

    if twice := doubled(item.name for item in items):
        raise BadParameter("items", twice[0], "each slide once")
    known = any(item.patient for item in items)

    def dealt(own: Sequence[Item], parts: int) -> list[list[list[Item]]]:
        """For each of `parts` the other slides and its own."""
        grades = [f"{item.grade} {item.provider}" for item in own]
        patients = [f"patient {i.patient}" if i.patient else f"slide {i.name}" for i in own] if known else None
        count, most = len(set(patients or own)), max(Counter(grades).values(), default=0)
        if not 2 <= parts <= (min(count, most) if known else count):
            few = f"{count} {'patients' if known else 'slides'}, {most} slides of the most frequent grade"
            raise BadParameter("folds, test", (folds, test), f"those that need 2 parts or more of {few}")
        kind = "StratifiedGroupKFold" if known else "StratifiedKFold" if parts <= most else "KFold"
        splitter = getattr(model_selection, kind)(parts, shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The least populated class")  # some parts lack rare grades
            return [[[own[i] for i in numbers] for numbers in pair] for pair in splitter.split(own, grades, patients)]

    rest, held = dealt(items, max(round(1 / test), 2))[0] if test else (list(items), [])
    return [{"train": train, "tune": tune, "test": held} for train, tune in dealt(rest, folds)]


@typed
def write_folds(
    name: str,
    root: str | Path,
    folds: Annotated[int, Range(2)] = 5,
    test: Annotated[float, Range(0, 1, "[)")] = 0.0,
    seed: Whole = 0,
) -> Path:
    """Write `split_folds` of a set to `folds/fold-<k>/{train,tune,test}.csv` and return the folder.

    Existing lists in that folder are deleted: mixing two partitions would train on test slides.
    """
    out = find(name, "slides").folder(root) / "folds"
    items = load(name, root)
    with atomic_folder(out) as new:
        for k, fold in enumerate(split_folds(items, folds, test, seed)):
            for split, own in fold.items():
                if own:
                    write_list(new / f"fold-{k}" / f"{split}.csv", own)
    return out


@typed
def write_list(path: str | Path, items: Iterable[Item]) -> None:
    """Write a list of slides and grades, in the format of a fold."""
    with atomic(path) as temporary:
        lines = ["slide_id,isup_grade", *(f"{item.name},{item.grade}" for item in items)]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _stored(path: str | Path) -> Iterator[Any]:
    """An HDF5 file of features, open. Raises `CorruptFile`: missing, truncated, or of another kind."""
    with extra("slides"):
        import h5py

    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError) as error:
        raise CorruptFile(path, f"no features of a slide ({error})") from error


@typed
def read_features(path: str | Path) -> dict[str, Any]:
    """The content of a file of features: "features" and "shares" (tensors), "coords" (M, 2) int64, "settings" (JSON).

    Raises `CorruptFile` for a file that is missing, truncated, or of another kind.
    """
    with _stored(path) as file:
        found = {key: torch.from_numpy(file[key][()]) for key in ("features", "coords", "shares")}
        found["settings"] = file.attrs["settings"]
    if len(found["features"]) != len(found["coords"]):
        raise CorruptFile(path, f"{len(found['features'])} features for {len(found['coords'])} regions")
    return found


@typed
def read_settings(path: str | Path) -> str:
    """The settings of a file of features as JSON, see `read_features`; the features are not read.

    Raises `CorruptFile` for a file that is missing, truncated, or of another kind.
    """
    with _stored(path) as file:
        return file.attrs["settings"]


class Features(Parts, Dataset):
    """Stored features of slides, padded to one length: (features (M, ...), present (M,) bool, grade).

    Memory holds a slide's own regions, not its padding; `collate` makes a batch without more than its longest slide.

    Args:
        items: the slides.
        path: folder of `<name>.h5` (what `companion slides` writes) or of the authors' `<name>.pt`.
        longest: number of regions to pad or truncate to; by default that of the longest slide.
        drop: leave out slides without features or without a region, and list them in `dropped`. Otherwise they raise an
            error.

    Raises:
        MissingData: features are missing.
        CorruptFile: a file that cannot be read, or whose shape differs from the others.
    """

    each = ("items", "files")

    @staticmethod
    def collate(items: Sequence[tuple[Tensor, Tensor, int]]) -> list[Tensor]:
        """Items as one batch, padded to its longest slide."""
        longest = max(int(present.sum()) for _, present, _ in items)
        return default_collate([(features[:longest], present[:longest], grade) for features, present, grade in items])

    @typed
    def __init__(self, items: Sequence[Item], path: str | Path, longest: Count | None = None, drop: bool = False):
        self.path = Path(path)
        self.shape: tuple[int, ...] = ()
        self.items: list[Item] = []
        self.files: list[Path] = []
        self.dropped: list[str] = []
        counts = [0]
        for item in items:
            file = next((f for f in (self.path / f"{item.name}{end}" for end in (".h5", ".pt")) if f.is_file()), None)
            count, *shape = (0,) if file is None else self._shape(file)
            if file is None or not count:
                if not drop:
                    what = "no features" if file is None else "no region with tissue"
                    how = "<slide_id>.h5    or <slide_id>.pt", "`companion slides`, one slide after the other"
                    detail = f"{what}: {item.name}"
                    raise MissingData("features of slides", self.path, *how, "that of the slides", detail)
                self.dropped.append(item.name)
                continue
            if self.items and tuple(shape) != self.shape:
                raise CorruptFile(file, f"its features are {tuple(shape)}, those of other slides {self.shape}")
            self.shape = tuple(shape)
            self.items.append(item)
            self.files.append(file)
            counts.append(count)
        self.longest = max(counts) if longest is None else longest

    def of(self, items: Iterable[Item]) -> Self:
        """The features of some of the slides, whose files are not opened again; the others are listed in `dropped`."""
        rows = {item.name: row for row, item in enumerate(self.items)}
        listed = [*items]
        there = [item for item in listed if item.name in rows]
        found = self.part([rows[item.name] for item in there])
        found.items = there  # a list may have a grade of its own
        found.dropped = [item.name for item in listed if item.name not in rows]
        return found

    def _shape(self, file: Path) -> tuple[int, ...]:
        if file.suffix == ".h5":
            with _stored(file) as stored:
                return stored["features"].shape
        return tuple(self._read(file).shape)

    @staticmethod
    def _read(file: Path) -> Tensor:
        if file.suffix == ".h5":
            return read_features(file)["features"]
        try:
            # mapped: only what is used is read, nothing for a shape; files of PyTorch before 1.6 are no archives
            mapped = zipfile.is_zipfile(file)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped).float()
        except Exception as error:  # a damaged file can raise anything
            raise CorruptFile(file, f"no tensor of features ({type(error).__name__})") from error

    @property
    def made_by(self) -> str:
        """The settings with which the first slide's features were extracted, as `companion slides` wrote them; of the
        authors' files, which have none, the first one's name and hash."""
        file = self.files[0]
        if file.suffix != ".h5":
            return f"{file.name}, sha256 {sha256(file)}"
        return read_settings(file)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        features = self._read(self.files[index])[: self.longest]
        # NumPy's zeros take no memory before they are written, and the padding never is; PyTorch's are written
        filled = torch.from_numpy(np.zeros((self.longest, *self.shape), np.float32))
        filled[: len(features)] = features
        return filled, torch.arange(self.longest) < len(features), self.items[index].grade


# --- the register -----------------------------------------------------------------------------------------------------


def parts(dataset: DataSet) -> dict[str, Callable[[Path], list[Item]]]:
    """See `companion.data.parts`: all slides; folds are lists of them."""
    return {"train": functools.partial(_table, dataset)}


def _table(dataset: DataSet, root: Path) -> list[Item]:
    """The slides of train.csv, each with an existing file."""
    top = dataset.folder(root)
    path = tables.existing(dataset, root, top / "train.csv")
    images = at(top, "train_images")
    there, items = {*entries(images)}, list[Item]()
    for line, row in _rows(path, *_COLUMNS):
        name, grade = row["image_id"], _grade(path, line, row["isup_grade"], dataset.classes)
        items.append(Item(name, images / f"{name}.tiff", grade, row["data_provider"]))
    lost = [item.path for item in items if item.path.name not in there]
    if lost:
        what = f"{len(lost)} of {len(items)} slides of {path.name} are not there, such as {lost[0]}"
        raise dataset.missing(root, what)
    tables.check_count(dataset, root, len(items), dataset.sizes.get("train"), f"slides in {path}")
    return items


def _grade(path: Path, line: int, text: str, classes: int) -> int:
    if text.strip().isdecimal() and int(text) < classes:
        return int(text)
    raise CorruptFile(path, f"line {line}: the grade {text!r} is not one of 0 to {classes - 1}")


def _rows(path: Path, *columns: str) -> Iterator[tuple[int, Mapping[str, str]]]:
    """The lines of a CSV with their numbers; the first column's names are plain file names, each unique."""
    seen: set[str] = set()
    for line, row in tables.rows(path, *columns):
        name = row[columns[0]]
        if not tables.is_name(name) or name in seen:
            wrong = "there twice" if name in seen else "not the name of a slide"
            raise CorruptFile(path, f"line {line}: {name!r} is {wrong}")
        seen.add(name)
        yield line, row
