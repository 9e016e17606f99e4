"""MetaSegNet: the cases of GeoSeg that cannot be written as calls of the library: UNetFormer's decoder, a training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from companion.models.layers.state_dicts import load_official
from companion.models.metasegnet import decoder
from companion.models.metasegnet.official import decoder_names
from companion.training.callbacks import Callback, Lookahead
from companion.training.fit import Loop, fit
from companion.training.hardware import CPU
from companion.training.schedules import schedule

from .runner import Case


def unetformer(case: Case) -> dict[str, Tensor]:
    """The outputs of UNetFormer's decoder, or of one of its parts."""
    settings = case.facts["settings"]
    part = changed(getattr(decoder, settings["part"])(*settings["sizes"])).eval()
    load_official(part, case.state, decoder_names(part), "UNetFormer")
    inputs = [case.input(name) for name in settings["inputs"]]
    with torch.no_grad():
        if isinstance(part, decoder.Decoder):
            logits, maps = part(inputs, settings["size"])
            found = {"logits": logits, "b4": maps["x4"], "b3": maps["x3"], "b2": maps["x2"], "p1": maps["x1"]}
            found["aux_logits"] = _auxiliary(part.aux_head, maps, settings["size"])
        else:
            found = {"out": part(*inputs)}
        if isinstance(part, decoder.GlobalLocalAttention):
            found["local"] = part.local(*inputs)
        if isinstance(part, decoder.Block):
            found["after_attention"] = inputs[0] + part.attention(part.norm1(inputs[0]))
    return {name: found[name][tuple(map(_index, at))] for name, at in settings["at"].items()}


def _index(text: str | int) -> int | slice:
    return slice(*(int(n) if n else None for n in text.split(":"))) if isinstance(text, str) else text


def changed(part: nn.Module) -> nn.Module:
    """A part of FT-UNetFormer's decoder as UNetFormer's: other convolutions, an auxiliary head."""
    for module in list(part.modules()):
        if isinstance(module, decoder.GlobalLocalAttention | decoder.Refinement):
            depthwise, pointwise, norm = module.out
            module.out = nn.Sequential(depthwise, norm, pointwise)
        if isinstance(module, decoder.WeightedFusion):
            old = module.lateral[0]
            module.lateral = decoder.conv(old.in_channels, old.out_channels, norm=False)
    if isinstance(part, decoder.Decoder):
        width, classes = part.head[2].in_channels, part.head[2].out_channels
        out = nn.Sequential(nn.Conv2d(width, classes, 1, bias=False))
        part.aux_head = nn.ModuleDict({"conv": decoder.conv(width, width, 3, act=True), "conv_out": out})
    return part


def _auxiliary(head: nn.ModuleDict, maps: dict[str, Tensor], size: Sequence[int]) -> Tensor:
    """The logits of the auxiliary head, which reads the sum of three maps; only here corners are aligned."""
    fine = maps["x2"].shape[-2:]
    x4, x3 = (F.interpolate(maps[name], fine, mode="bilinear", align_corners=True) for name in ("x4", "x3"))
    return decoder.resized(head["conv_out"](head["conv"](x4 + x3 + maps["x2"])), size)


def lookahead(case: Case) -> dict[str, Tensor]:
    """The parameters theta and beta after each step of a training with Lookahead."""
    settings, steps = case.facts["settings"], []
    theta, beta = parameters = nn.ParameterList(nn.Parameter(case.input(g["name"])) for g in settings["groups"])
    groups = [
        {"params": [p], "lr": g["lr"], "weight_decay": g["weight_decay"]}
        for p, g in zip(parameters, settings["groups"], strict=True)
    ]

    def loss(*_: object) -> Tensor:
        return (theta - 1).square().sum() + (theta * beta).square().sum()

    class Record(Callback):
        def on_step_end(self, loop: Loop) -> None:
            steps.append(torch.cat([theta, beta]).detach().cpu())

    callbacks = [Lookahead(settings["k"], settings["alpha"]), Record()]
    with torch.device("cpu"):
        fit(
            parameters,
            loss,
            TensorDataset(torch.zeros(1)),
            epochs=settings["steps"],
            batch=1,
            optimizer=lambda _: torch.optim.AdamW(groups),
            schedule=schedule("constant", 0),
            callbacks=callbacks,
            hardware=CPU,
        )
    return {"trajectory": torch.stack(steps)}
