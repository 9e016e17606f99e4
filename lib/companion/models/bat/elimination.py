"""Candidate elimination (section 3.5), from OSTrack: search tokens that the template hardly attends to are removed.

OSTrack removes three tenths of them after the attention of blocks 3, 6 and 9, BAT's released configurations none. Each
stream keeps its own tokens, so that from then on the adapters mix different positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, cat

from ...errors import BadParameter


def checked(shares: Mapping[int, float], depth: int) -> dict[int, float]:
    """Block -> share of the search tokens that remain, without the blocks that remove none.

    Raises `BadParameter`: a block or a share that does not exist.
    """
    remaining = {int(i): share for i, share in shares.items()}  # in a JSON file they are text
    if any(i not in range(depth) or not 0 < share <= 1 for i, share in remaining.items()):
        raise BadParameter("elimination", dict(shares), f"blocks 0 to {depth - 1}, shares above 0 and up to 1")
    return {i: share for i, share in remaining.items() if share < 1}


def eliminate(x: Tensor, kept: Tensor, attention: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The tokens without the eliminated ones, and what remains of `kept`, in falling order of attention.

    Args:
        x: (b, n + m, d), n template tokens first.
        kept: (b, m), the position of each search token in the crop.
        attention: (b, m), of the template to the search tokens.
        share: of the search tokens that remain: k = ceil(share m).
    """
    order = attention.topk(math.ceil(share * attention.shape[1]), dim=1).indices  # (b, k)
    n = x.shape[1] - kept.shape[1]
    search = x[:, n:].gather(1, order[..., None].expand(-1, -1, x.shape[-1]))  # (b, k, d)
    return cat([x[:, :n], search], 1), kept.gather(1, order)


def restore(x: Tensor, kept: Tensor, m: int) -> Tensor:
    """The tokens (b, n + m, d) of (b, n + k, d): those that remain at their positions, zeros for the others."""
    n = x.shape[1] - kept.shape[1]
    search = x.new_zeros(len(x), m, x.shape[-1])
    return cat([x[:, :n], search.scatter(1, kept[..., None].expand(-1, -1, x.shape[-1]), x[:, n:])], 1)
