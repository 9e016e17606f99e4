"""Record a case from the authors' code, where it runs; `runner` has the form, and compares.

from tests.parity.record import record

record("<slug>", "<case>", TheirModel(depth=2), lambda model, given: {"logits": model(given["image"])},
       inputs={"image": (2, 3, 224, 224)},
       steps=[{"name": "model", "call": "models.<slug>.model:Ours.from_official", "args": ["$state"]},
              {"name": "logits", "call": "$model", "args": ["$image"]}],
       outputs={"logits": "$logits"}, about={"official_commit": "owner/name@commit", "what": "..."})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from companion.io.files import atomic, write_json

from . import fill
from .runner import ROOT


def record(
    slug: str,
    case: str,
    module: nn.Module,
    forward: Callable[[nn.Module, Mapping[str, Tensor]], Mapping[str, Tensor]],
    inputs: Mapping[str, Sequence[int] | Tensor],
    steps: Sequence[Mapping[str, Any]],
    outputs: Mapping[str, Any],
    *,
    about: Mapping[str, Any],
    seed: int = 0,
    root: Path = ROOT,
) -> Path:
    """The folder of a new case, with names.json, case.json and outputs.safetensors.

    Args:
        module: the authors' model, in the mode that is recorded. Its floating tensors are overwritten by those of
            `fill`, its counters of batches by 0; other integers are kept, and written to case.json.
        forward: from it and the inputs to the recorded outputs, by name. Of one named "loss" the norm of each
            parameter's gradient is recorded too, as "grad:<name>".
        inputs: a shape, whose values are those of `fill`, or the tensor itself.
        steps, outputs: how our code is called, and where each output is read: see `runner`. Of gradients
            {"grad:*": {"each": "$grad", "apply": ["norm"]}}.
        about: repository, commit and class, and what the case shows.
    """
    state, fixed = module.state_dict(), {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            tensor.copy_(torch.from_numpy(fill.parameter(name, tuple(tensor.shape), seed)))
        elif name.endswith("num_batches_tracked"):
            tensor.zero_()
        else:
            fixed[name] = tensor.tolist()
    stored = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    filled = {name: shape for name, shape in inputs.items() if name not in stored}
    given = {name: torch.from_numpy(fill.values(f"input:{name}", tuple(filled[name]), seed)) for name in filled}
    found = dict(forward(module, given | stored))
    if "loss" in found and found["loss"].requires_grad:
        found["loss"].backward()
        found |= {f"grad:{name}": p.grad.norm() for name, p in module.named_parameters() if p.grad is not None}
    folder = root / slug / case
    folder.mkdir(parents=True)
    tensors = found | {f"in.{name}": value for name, value in stored.items()}
    with atomic(folder / "outputs.safetensors") as temporary:
        temporary.write_bytes(save({name: value.detach().contiguous() for name, value in tensors.items()}))
    write_json(folder / "names.json", {name: list(tensor.shape) for name, tensor in state.items()})
    facts: dict[str, Any] = {"seed": seed, "recorded": {}, "fixed": fixed}
    facts["inputs"] = {name: {"shape": list(shape)} for name, shape in filled.items()}
    facts["inputs"] |= {name: {"stored": f"in.{name}"} for name in stored}
    facts["steps"] = [{"args": [], "kwargs": {}} | dict(step) if "call" in step else dict(step) for step in steps]
    write_json(folder / "case.json", facts | {"outputs": dict(outputs), "about": dict(about)})
    return folder
