"""Position embeddings of vision transformers: fixed tables of sines and cosines, and resizing to another grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import BadParameter, check_choice

KINDS = ("mae", "mocov3", "ecamp")


def sincos_table(width: int, side: int, kind: str = "mae") -> Tensor:
    """A fixed position embedding (1, 1 + side², width) of sines and cosines, zeros for the [CLS] token.

    "mae": the first half of the channels codes the column, the second the row, each half [sin(p w), cos(p w)] with
    w_i = 10000^(-i / (width / 4)). "mocov3": the two halves exchanged. "ecamp": as "mae" with w_i = 10000^(-i / width),
    so that the slowest frequency is about 0.1 instead of 0.0001.

    Raises `BadParameter`: a width that is not a multiple of 4, or an unknown kind.
    """
    if width % 4:
        raise BadParameter("width", width, "a multiple of 4, for a table of sines and cosines")
    check_choice("kind", kind, KINDS)
    steps = torch.arange(width // 4, dtype=torch.float64) / (width if kind == "ecamp" else width // 4)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * 10000.0**-steps
    axis = torch.cat([angles.sin(), angles.cos()], 1)  # (side, width / 2)
    row, column = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    halves = [row, column] if kind == "mocov3" else [column, row]
    return F.pad(torch.cat(halves, 2).flatten(0, 1).float(), (0, 0, 1, 0))[None]


def resize_pos_embed(table: Tensor, grid: Sequence[int], *, offset: float = 0.0) -> Tensor:
    """A position embedding (1, 1 + s s, D) for a grid of (h, w) tokens: bicubic, no antialiasing, [CLS] unchanged.

    Args:
        offset: added to the sides before the scale is computed: 0.1 in DINO's and iBOT's code, which guards against a
            side that is rounded down and moves the samples slightly; 0: the sizes themselves are given.
    """
    side = math.isqrt(table.shape[1] - 1)
    if tuple(grid) == (side, side):
        return table
    square = table[:, 1:].mT.unflatten(2, (side, side))
    target = {"scale_factor": tuple((n + offset) / side for n in grid)} if offset else {"size": tuple(grid)}
    resized = F.interpolate(square, **target, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], resized.flatten(2).mT], 1)
