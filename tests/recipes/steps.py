"""What the recorded cases of several papers have in common: numbers, arrays and transforms in words, initial values,
the order in which items are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from tests.recipes.runner import Row, near, same

Step = tuple[str, list[float], str]  # its name, its numbers, its interpolation
ATTRIBUTES = {"Resize": ["size"], "RandomCrop": ["size"], "RandomResizedCrop": ["size", "scale", "ratio"]}
ATTRIBUTES |= {"Pad": ["padding", "fill"], "RandomHorizontalFlip": ["p"], "Normalize": ["mean", "std"]}


def done(transform: v2.Compose) -> list[Step]:
    """The steps of a transform; equal numbers of the three channels are one."""
    found: list[Step] = []
    for step in transform.transforms:
        name, numbers = type(step).__name__, list[float]()
        for attribute in ATTRIBUTES.get(name, ()):
            value = getattr(step, attribute)
            values = [float(n) for n in np.atleast_1d(value)]
            numbers += values[:1] if len(values) == 3 and len(set(values)) == 1 else values
        if name == "PILToTensor":
            name = "ToTensor"
        if name == "ToTensor" or name in ATTRIBUTES:
            interpolation = getattr(step, "interpolation", "")
            found.append((name, numbers, str(getattr(interpolation, "value", interpolation))))
    return found


class Watched(Dataset):
    """Items of a dataset; `asked` holds the indices in the order of a training without worker processes."""

    def __init__(self, *tensors: Tensor):
        self.tensors, self.asked = tensors, list[int]()

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.asked.append(int(index))
        return tuple(tensor[index] for tensor in self.tensors)


def normal(*arrays: Mapping[str, Any]) -> Any:
    """Normal float32 arrays that one generator draws one after the other: the first has the seed, each its shape."""
    rng = np.random.default_rng(arrays[0]["seed"])
    found = [torch.from_numpy(rng.standard_normal(facts["shape"], dtype=np.float32)) for facts in arrays]
    return found if len(found) > 1 else found[0]


def picture(expected: Mapping[str, Any], image: Tensor, what: str = "", **room: float) -> list[Row]:
    """The shape, some rows and columns, mean and std of an image (C, H, W); `room` by quantity, absolute."""
    grid = image[:, expected["rows"]][:, :, expected["columns"]]
    ours = {"grid": grid, "mean": image.mean((1, 2)), "std": image.std((1, 2), correction=0)}
    sizes = {"shape": expected["shape"], "rows": [len(expected["rows"])], "columns": [len(expected["columns"])]}
    found = {"shape": image.shape, "rows": [grid.shape[1]], "columns": [grid.shape[2]]}
    rows = [same(name + what, sizes[name], value) for name, value in found.items()]
    return rows + [near(name + what, expected[name], value, absolute=room[name]) for name, value in ours.items()]


def initial(what: str, facts: Mapping[str, float], value: Tensor) -> list[Row]:
    """Count, standard deviation, mean and kind of an initial tensor; both are draws, which vary with their count."""
    value, count, std = value.detach().double().flatten(), facts["count"], facts["std"]
    room = max(0.1, 4 / count**0.5)
    rows = [
        same(f"{what} count", count, value.numel()),
        near(f"{what} std", std, value.std(correction=0), relative=room, absolute=1e-12),
        near(f"{what} mean", facts["mean"], value.mean(), relative=1e-6 * (not std), absolute=room * std),
    ]
    if std and count >= 40:  # a normal distribution reaches far, a uniform one 1.7 standard deviations
        uniform = facts["max_abs"] < 2 * std
        rows.append(same(f"{what} uniform", uniform, bool(value.abs().max() < 2 * value.std())))
    return rows
