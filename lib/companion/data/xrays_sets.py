"""Facts of the sets of radiographs and fundus images, from xrays_sets.yaml: lists, classes, sizes, licences."""

from __future__ import annotations

from . import facts

_FACTS = facts("xrays")
TASKS: tuple[str, ...] = _FACTS["TASKS"]
CLASSES: dict[str, tuple[str, ...]] = _FACTS["CLASSES"]
"""Names by label, in the order of the columns in the authors' lists; of COVIDx and APTOS, whose lists have class
numbers, the names of the sets' own tables."""
ONE_OF: tuple[str, ...] = _FACTS["ONE_OF"]
"""Sets with one class an image; all others have 0 or 1 for each class."""
SIZES: dict[tuple[str, str], dict[str, int]] = {
    (name, task): lengths for name, by_task in _FACTS["SIZES"].items() for task, lengths in by_task.items()
}
"""Images of each list: the training list for 1, 10 and 100 % of the labels, validation and test. Those of 100 % that
are absent here could not be read; a list of any length is accepted for them."""
REPORTS: tuple[str, ...] = _FACTS["REPORTS"]
WINDOWS: tuple[str, ...] = _FACTS["WINDOWS"]

# the training list for 1, 10 and 100 % of the labels (none is part of a larger one), then validation and test
_SPLITS = {"1": "train_list_1", "10": "train_list_10", "100": "train_list", "val": "val_list", "test": "test_list"}


def lists(task: str) -> dict[str, str]:
    """The list of each share and split of a task, below a set's folder."""
    return {key: f"{stem}.{'txt' if task == 'classification' else 'csv'}" for key, stem in _SPLITS.items()}


def tasks(name: str) -> tuple[str, ...]:
    """The tasks that a set supports, the usual one first."""
    return tuple(task for task in TASKS if (name, task) in SIZES) or ("pre-training",)
