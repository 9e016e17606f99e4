"""NAME's tensors under the authors' names (TODO owner/repository)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..layers.state_dicts import OfficialModel


class Released(OfficialModel):
    """TODO the authors' names, from ours: inherit it in the model."""

    rules = ((r"^backbone\.", ""),)

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], **options: Any):
        """The model with a state dict of the authors' code in it.

        Raises `BadCheckpoint`: names that are missing, unknown or of another shape, all of them listed.
        """
        raise NotImplementedError("TODO: models/SLUG/official.py")
