"""What the tests of several toy data sets use."""

import hashlib

import numpy as np
import torch


def pinned(*values: object) -> str:
    """A hash of arrays, tensors (to three decimals) and other values."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            value = (value.double() * 1000).round().long().numpy()
        array = isinstance(value, np.ndarray)
        digest.update(repr((str(value.dtype), value.shape) if array else value).encode())
        digest.update(np.ascontiguousarray(value).tobytes() if array else b"")
    return digest.hexdigest()[:12]
