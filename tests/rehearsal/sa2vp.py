"""SA²VP: VTAB-1k on both backbones, FGVC, HTA, and a folder of one's own."""

from pathlib import Path

import pytest

from companion.data import DATASETS
from tests.data import test_classification as layouts
from tests.data.conftest import picture
from tests.rehearsal.common import Fault


def write(name: str, root: Path, patch: pytest.MonkeyPatch) -> None:
    """The data set in its layout, of three classes or two."""
    group, _, key = name.partition("/")
    if name == "folder":
        for number in range(12):
            picture(root / "ab"[number % 2] / f"{number}.png", number)
    elif name == "hta/cifar100":
        layouts.shrink(patch, name, 2, 8, 2, 4)
        layouts.cifar(root, patch, "cifar100")
    elif name in layouts.HTA:
        layouts.shrink(patch, name, 2, *map(len, layouts.HTA[name][1:]))
        layouts.HTA[name][0](root, patch)
    else:
        layouts.shrink(patch, name, 3, 3, 2, 4)
        layouts.vtab(root, DATASETS[name].folders[0]) if group == "vtab" else layouts.fgvc(root, key)


RUNS = [{"dataset": name} for name, known in DATASETS.items() if known.task == "classification"]
RUNS += [{"dataset": "vtab/svhn", "backbone": "swin_b"}, {"dataset": "folder"}]


def listed(text: str):  # type: ignore[no-untyped-def]
    """The training list of VTAB-1k, with another text."""

    def damage(root: Path) -> Path:
        (path := root / "vtab-1k/svhn/train800val200.txt").write_text(text)
        return path

    return damage


def unreadable(root: Path) -> Path:
    (path := root / "vtab-1k/svhn/images/test/1.png").write_bytes(path.read_bytes()[:40])
    return path


def missing(root: Path) -> Path:
    (path := root / "vtab-1k/svhn/test.txt").unlink()
    return path


def overlap(root: Path) -> Path:
    lists = [root / f"vtab-1k/svhn/{name}.txt" for name in ("test", "train800val200")]
    rows = [path.read_text().splitlines(keepends=True) for path in lists]
    lists[0].write_text("".join([rows[1][0], *rows[0][1:]]))
    return Path(rows[1][0].split()[0])


SVHN = {"dataset": "vtab/svhn"}
FAULTS = {
    "a missing list": Fault(SVHN, missing, "test.txt"),
    "a label out of range": Fault(SVHN, listed("images/trainval/0.png 3\n" * 5), "line 1"),
    "an unreadable image": Fault(SVHN, unreadable, "1.png"),
    "splits that overlap": Fault(SVHN, overlap, "'train' and 'test'"),
    "the list of another set": Fault(SVHN, listed("images/trainval/0.png 1\n" * 3), "3 .* 5 "),
}
