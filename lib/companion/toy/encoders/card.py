"""Weights and model card of a small encoder, and the command line that writes them.

The prose of a model card, its licence, attribution, library, data and command are in the shipped .md file only.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from ...ops.files import atomic
from .. import encoders

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def save(
    folder: str | Path,
    name: str,
    state: Mapping[str, Tensor],
    quality: object,
    recipe: Mapping[str, object],
    seconds: float,
    **facts: Any,
) -> Path:
    """Write tensors to `folder`/`name`.safetensors and their model card to the .md; return the former's path.

    Args:
        quality: measured, for the model card.
        recipe: settings of the training.
        seconds: of the training.
        facts: further entries of the model card's front matter; "parameters" excludes the statistics of batch norms.
    """
    path = Path(folder) / f"{name}.safetensors"
    with atomic(path) as temporary:
        save_file({key: value.contiguous() for key, value in state.items()}, temporary)
    facts = {
        "recipe": dict(recipe),
        "seconds": round(seconds),
        "parameters": sum(value.numel() for key, value in state.items() if not key.endswith(_STATISTICS)),
        **facts,
        "torch": torch.__version__.split("+")[0],
        "threads": torch.get_num_threads(),
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    update(path, name, quality, **facts)
    return path


def update(path: Path, name: str, quality: object, **facts: Any) -> None:
    """Write the model card of the weights at `path`: the shipped model card of `name` with new facts and quality."""
    _, old, text = (encoders.WEIGHTS / f"{name}.md").read_text(encoding="utf-8").split("---\n", 2)
    facts = {**yaml.safe_load(old), **facts, "quality": quality}
    with atomic(path.with_suffix(".md")) as temporary:
        head = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=110)
        temporary.write_text(f"---\n{head}---\n{text}", encoding="utf-8")


def command(
    make: Callable[..., Path],
    names: Iterable[str] = (),
    seed: int | None = 0,
    measure: Callable[[str], Path] | None = None,
) -> None:
    """Command line of a module: train, measure and write an encoder.

    Args:
        make: `make([name,] folder[, seed])` does so and returns the path of the weights.
        names: of the encoders, if there are several.
        seed: of the shipped weights; None: fixed.
        measure: `measure(name)` measures the shipped weights again.
    """
    module = Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(
        prog=f"python -m companion.toy.encoders.{module}", description=sys.modules["__main__"].__doc__
    )
    if names:
        parser.add_argument("name", choices=list(names))
    parser.add_argument("--folder", type=Path, default=encoders.WEIGHTS, help="where to write (default: the package's)")
    if seed is not None:
        parser.add_argument("--seed", type=int, default=seed)
    if measure is not None:
        parser.add_argument("--measure", action="store_true", help="only measure the shipped weights again")
    given = vars(parser.parse_args())
    torch.set_num_threads(1)  # the exact result depends on the number of threads
    again = given.pop("measure", False) and measure
    path = again(given["name"]) if again else make(*([given.pop("name")] if names else []), **given)
    print(path.with_suffix(".md").read_text(encoding="utf-8"))
