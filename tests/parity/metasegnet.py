"""MetaSegNet: the cases recorded from WangLibo1995/GeoSeg at 9453fe4, the first author's image-only code.

The paper's own network is not public: no case covers its text branch or its fusion.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from companion.evaluation.metrics import landcover
from .legacy import Case, run
from companion.training.callbacks import Callback, Lookahead
from companion.training.fit import CPU, Loop, fit
from companion.training.schedules import schedule
from companion.models.metasegnet import model as metasegnet
from companion.models.metasegnet.model import Block, Decoder, GlobalLocalAttention, MetaSegNet, Refinement, WeightedFusion


def outputs(case: Case) -> dict[str, Tensor]:
    """The recorded quantities of any case, by our code, in the order of the forward pass."""
    kinds = {
        "ft_unetformer": _whole,
        "decoder": _decoder,
        "global_local": _attention,
        "gltb": _block,
        "weighted_fusion": _fusion,
        "feature_refinement": _fusion,
        "losses": _losses,
        "metrics": _metrics,
        "lookahead": _lookahead,
        "tta": _augmented,
    }
    return run(kinds, case)


def recorded(case: Case) -> dict[str, Tensor]:
    """The recorded outputs of a case: tensors of its file, and numbers under "results" in case.json."""
    numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in case.facts.get("results", {}).items()}
    return case.recorded | numbers


def _state(case: Case) -> Mapping[str, Tensor]:
    """The official tensors, with the two weights of each fusion from case.json."""
    if case.given is not None:
        return case.given
    fixed = {name: torch.tensor(values) for name, values in case.facts.get("overrides", {}).items()}
    return dict(case.state) | fixed


def _kind(case: Case) -> str:
    return "unetformer" if "unet" in case.name.split("_") or "unetformer" in case.name else "ft_unetformer"


@torch.no_grad()
def _whole(case: Case) -> dict[str, Tensor]:
    trace: dict[str, Tensor] = {}
    logits = MetaSegNet.from_official(_state(case))(case.input("image"), trace=trace)
    found = {}
    for k, stage in enumerate(trace["maps"], 1):
        found[f"stage{k}"] = stage[0, ::16]
    return found | {"logits": logits[0, :, ::8, ::8]}


@torch.no_grad()
def _decoder(case: Case) -> dict[str, Tensor]:
    state, inputs = _state(case), case.facts["inputs"]
    sizes = metasegnet.decoder_sizes(state)
    kind, auxiliary = sizes.pop("decoder"), sizes.pop("auxiliary")
    channels = [inputs[f"res{k}"][1] for k in (1, 2, 3, 4)]
    decoder = metasegnet.load_part(Decoder(channels, kind=kind, auxiliary=auxiliary, **sizes), state)
    trace: dict[str, Tensor] = {}
    logits = decoder([case.input(f"res{k}") for k in (1, 2, 3, 4)], (inputs["h"], inputs["w"]), trace)
    found = {"b4": trace["b4"][0, ::8], "b3": trace["b3"][0, ::8], "p1": trace["p1"][0, ::32, ::2, ::2]}
    if auxiliary:
        found["aux_logits"] = trace["auxiliary"][0, :, ::8, ::8]
    return found | {"logits": logits[0, :, ::8, ::8]}


@torch.no_grad()
def _attention(case: Case) -> dict[str, Tensor]:
    config = case.facts["config"]
    part = GlobalLocalAttention(config["dim"], config["num_heads"], config["window_size"], _kind(case))
    metasegnet.load_part(part, _state(case))
    x = case.input("x")
    return {"local": part.local(x)[0, ::4], "out": part(x)[0]}


@torch.no_grad()
def _block(case: Case) -> dict[str, Tensor]:
    config = case.facts["config"]
    block = Block(config["dim"], config["num_heads"], config["window_size"], _kind(case))
    metasegnet.load_part(block, _state(case))
    x = case.input("x")
    return {"after_attention": (x + block.attention(block.norm1(x)))[0, ::4], "out": block(x)[0]}


@torch.no_grad()
def _fusion(case: Case) -> dict[str, Tensor]:
    config = case.facts["config"]
    part = Refinement if case.name.startswith("feature") else WeightedFusion
    module = part(config["in_channels"], config["decode_channels"], _kind(case))
    metasegnet.load_part(module, _state(case))
    return {"out": module(case.input("x"), case.input("res"))[0]}


def _losses(case: Case) -> dict[str, Tensor]:
    config = case.facts["config"]
    shape = [int(n) for n in re.findall(r"\[([\d,\s]+)\]", case.facts["inputs"]["logits"])[0].split(",")]
    ignore, classes, smooth = config["ignore_index"], config["num_classes"], config["smooth_factor"]
    logits = (2 * case.values("input:logits", *shape)).requires_grad_()
    auxiliary = 2 * case.values("input:aux", *shape)
    batch, _, *size = shape
    labels = (1000 * case.values("input:labels", batch, *size).double().abs()).floor().long() % (classes + 1)
    labels = labels.where(labels != classes - 1, classes - 2)
    joint = metasegnet.joint_loss(logits, labels, ignore)
    joint.backward()
    soft = metasegnet.soft_cross_entropy
    valid = (labels != ignore).float().mean()
    plain = soft(logits, labels, ignore, smooth)
    return {
        "labels": labels,
        "valid_fraction": valid,
        "soft_ce": plain,
        "ce_without_smoothing": soft(logits, labels, ignore, 0.0),
        f"torch_cross_entropy_label_smoothing_{smooth:g}": plain / valid,
        "dice": metasegnet.dice_loss(logits, labels, ignore),
        "joint": joint,
        "unetformer_loss_eval": joint,
        "unetformer_loss_train": metasegnet.joint_loss(logits, labels, ignore, auxiliary),
        "grad_joint": logits.grad[0],
    }


def _metrics(case: Case) -> dict[str, Tensor]:
    truth, predicted = case.recorded["gt"], case.recorded["pred"]
    classes = case.facts["config"]["num_classes"]
    matrix = landcover.confusion(truth, predicted, classes)
    every, some = landcover.scores(matrix), landcover.scores(matrix, [classes - 1])
    found = {"gt": truth, "pred": predicted, "confusion": matrix, "iou": every.iou / 100, "f1": every.f1 / 100}
    means = {
        "mIoU_all": every.miou,
        "mF1_all": every.mf1,
        "OA": every.oa,
        "mIoU_without_last": some.miou,
        "mF1_without_last": some.mf1,
    }
    return found | {name: torch.tensor(value / 100, dtype=torch.float64) for name, value in means.items()}


def _lookahead(case: Case) -> dict[str, Tensor]:
    config = case.facts["config"]
    theta, beta = parameters = nn.ParameterList(nn.Parameter(case.input(name)) for name in ("theta", "beta"))
    groups = [
        {"params": [p], "lr": g["lr"], "weight_decay": g["weight_decay"]}
        for p, g in zip(parameters, config["groups"], strict=True)
    ]
    steps = []

    def loss() -> Tensor:
        return (theta - 1).square().sum() + (theta * beta).square().sum()

    class Record(Callback):
        def on_step_end(self, loop: Loop) -> None:
            steps.append(torch.cat([theta, beta]).detach().cpu())

    data = TensorDataset(torch.zeros(1, device="cpu"))
    settings: dict[str, Any] = {"epochs": config["steps"], "batch": 1, "schedule": schedule("constant", 0)}
    settings |= {"optimizer": lambda _: torch.optim.AdamW(groups), "hardware": CPU}
    callbacks = [Lookahead(config["k"], config["alpha"]), Record()]
    with torch.device("cpu"):
        fit(parameters, lambda *_: loss(), data, callbacks=callbacks, **settings)
    return {"trajectory": torch.stack(steps)}


@torch.no_grad()
def _augmented(case: Case) -> dict[str, Tensor]:
    model = nn.Sequential(nn.Conv2d(3, 5, 5, padding=2), nn.ReLU6(), nn.Conv2d(5, 4, 3, padding=1))
    model.load_state_dict(dict(case.state))
    kinds = {"plain": "none", "lr": "lr", "d4_potsdam": "d4", "d4_loveda": "d4 loveda"}
    return {name: metasegnet.augmented(model, case.input("image"), kind)[0] for name, kind in kinds.items()}
