"""The companion: vision-transformer papers of December 2023, each as one notebook that runs.

`save`, `load` and `predict` work on a trained model of any paper.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .saving import load, predict, save

__version__ = "0.2.0"
__all__ = ["load", "predict", "save"]


def __getattr__(name: str) -> Any:
    """The functions above, imported on first access, since importing torch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'companion' has no attribute {name!r}")
    return getattr(importlib.import_module(".saving", __name__), name)
