"""Training of the small encoders that ship with the package.

    python -m tools.encoders.<name> [folder]

trains an encoder on one thread, measures it, and writes weights and model card, by default over the shipped ones.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from companion.io.files import atomic
from companion.toy import encoders

# tensors that are no parameters: the statistics of batch norms, the classes of a zero-shot classifier
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "classifier.classes")


def ship(
    name: str,
    train: Callable[..., Any],
    measure: Callable[[Any], Mapping[str, float]],
    recipe: Mapping[str, Any],
    folder: str | Path = "",
    *,
    tensors: Callable[[Any], Mapping[str, Tensor]] = nn.Module.state_dict,
    **facts: Any,
) -> Path:
    """Train an encoder, measure it, and write `name`.safetensors and its model card; return the path of the former.

    Licence, attribution, data, command and text of the card are those of the shipped card. Its `quality` is kept too
    where the weights are the shipped ones; else it becomes what `measure` returns, and the text and the notebooks that
    show other numbers of the shipped card have to follow.

    Args:
        train: called with the entries of `recipe`; returns the model.
        measure: of the model, for the card: one number, or one for each of several models.
        folder: where to write; "": the argument of the command line, or the package.
        tensors: of the model, to be saved.
        facts: further entries of the card.
    """
    torch.set_num_threads(1)  # the exact result depends on it
    start = time.monotonic()
    model = train(**recipe)
    seconds = round(time.monotonic() - start)
    state = {key: value.contiguous() for key, value in tensors(model).items()}
    path = Path(folder or (sys.argv[1] if sys.argv[1:] else encoders.WEIGHTS)) / f"{name}.safetensors"
    _, head, text = (encoders.WEIGHTS / f"{name}.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(head)
    with atomic(path) as temporary:
        save_file(state, temporary)
    facts |= {
        "recipe": dict(recipe),
        "seconds": seconds,
        "parameters": sum(value.numel() for key, value in state.items() if not key.endswith(_BUFFERS)),
        "torch": torch.__version__.split("+")[0],
        "threads": torch.get_num_threads(),
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    quality = {what: round(value, 3) for what, value in measure(model).items()}
    print(f"{path}: {'as' if facts['sha256'] == card['sha256'] else 'not as'} shipped; {quality}")
    if facts["sha256"] != card["sha256"]:
        facts["quality"] = quality
    head = yaml.safe_dump(card | facts, sort_keys=False, allow_unicode=True, width=110)
    with atomic(path.with_suffix(".md")) as temporary:
        temporary.write_text(f"---\n{head}---\n{text}", encoding="utf-8")
    return path
