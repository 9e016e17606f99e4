"""Deterministic weights and inputs, generated from a parameter's name and shape alone.

A parity fixture holds the names and shapes of an official model's tensors and the outputs of the official code. The
tensors themselves are generated here, identically on every machine, so a full-size model can be compared without
storing its weights.

    python fill.py NAMES.json            # prints one checksum per line, to compare two machines
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import numpy as np


def values(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Standard normal float32 values of `shape`, fixed by `name` and `seed`."""
    generator = np.random.Generator(np.random.Philox(key=[zlib.crc32(name.encode()), seed]))
    return generator.standard_normal(shape, dtype=np.float32)


def parameter(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A weight that keeps activations near unit scale.

    * a matrix or kernel: normal, scaled by 1/sqrt(fan in)
    * a vector whose name ends in `weight`, `gamma` or `scale`: 1 + 0.1 normal (a norm's gain)
    * a vector whose name ends in `running_var`: 1 + 0.1 |normal|
    * any other vector (a bias, a running mean): 0.1 normal
    * a tensor of more than two axes with a leading 1 (a token, a position table): 0.1 normal
    """
    x = values(name, tuple(shape), seed)
    if len(shape) >= 3 and shape[0] == 1:
        return 0.1 * x
    if len(shape) >= 2:
        return x / np.sqrt(np.prod(shape[1:]), dtype=np.float32)
    if name.endswith("running_var"):
        return 1 + 0.1 * np.abs(x)
    if name.endswith(("weight", "gamma", "scale")):
        return 1 + 0.1 * x
    return 0.1 * x


def state_dict(names: dict[str, list[int]], seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of `names` (name -> shape). The caller must skip integer buffers."""
    return {name: parameter(name, tuple(shape), seed) for name, shape in names.items()}


if __name__ == "__main__":
    for name, array in state_dict(json.loads(Path(sys.argv[1]).read_text())).items():
        print(f"{zlib.crc32(np.ascontiguousarray(array).tobytes()):08x}  {name}")
