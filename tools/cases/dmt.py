"""DMT's cases of version 2: its teachers and ancestors, recorded from the codes of MAE, MoCo v3, iBOT, DINO, G2SD, DMAE
and TinyMIM."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from . import Old, call, tap

VIT, MAE = "models.dmt.vit:ViT.from_official", "models.layers.mae:MAE.from_official"


def parity(old: Old) -> dict[str, Any]:
    """The calls and taps of any case, by the beginning of its name."""
    for start, made in {
        "dino_head": _head,
        "dino": _encoder,
        "dmae": _dmae,
        "g2sd": _g2sd,
        "ibot_loss": _ibot_loss,
        "ibot": _encoder,
        "mae": _mae,
        "mocov3_contrastive": _contrast,
        "mocov3_heads": _moco_heads,
        "mocov3": _encoder,
        "sincos": _tables,
        "tinymim": _tinymim,
    }.items():
        if old.name.startswith(start):
            return made(old)
    raise ValueError(f"{old.folder}: no kind of DMT's")


def _part(old: Old, name: str, count: int, usual: int) -> tuple[int, int]:
    """The step between the recorded tokens among `count`, and the number of recorded channels."""
    rows, channels = old.shapes[name][-2:]
    said = re.search(r"every (\d+)", str(old.facts.get("outputs", {}).get(name, "")))
    step = int(said[1]) if said else usual
    if -(-count // step) != rows:
        step = next((n for n in range(1, count + 1) if -(-count // n) == rows), usual)
    return step, channels


def _tokens(old: Old, name: str, of: str, count: int, usual: int, first: int = 0) -> dict[str, Any]:
    """The recorded part of tokens (B, first + count, D), from the token `first` on."""
    step, channels = _part(old, name, count, usual)
    return tap(of, ":", f"{first}::{step}", f":{channels}")


def _patches(old: Old, image: str = "image", prefix: str = "") -> int:
    """The number of patches of an input."""
    return math.prod(old.shape(image)[2:]) // old.names[f"{prefix}patch_embed.proj.weight"][-1] ** 2


def _images(old: Old) -> dict[str, Any]:
    """The inputs that are images and noise."""
    return {name: old.input(name) for name in old.facts["inputs"] if name.startswith(("image", "mask_noise"))}


def _masked(old: Old) -> dict[str, Any]:
    """A mask: values above a number that the sentence names."""
    above = re.search(r"> *([\d.]+)", str(old.facts["inputs"]["mask"]))
    return old.input("mask", ["gt", float(above[1]) if above else 0.3], ["flatten", 1])


def _mae(old: Old) -> dict[str, Any]:
    config, patches, run = old.config, _patches(old), "$run.1"
    ratio = config.get("mask_ratio", 0.75)
    return {
        "inputs": _images(old),
        "steps": [
            call(
                "model", MAE, "$state", config["num_heads"], config["decoder_num_heads"], mask_ratio=ratio,
                normalise=config.get("norm_pix_loss", True),
            ),
            call("run", "$model.forward_intermediates", "$image", "$mask_noise"),
            call("full", "$model.encode", "$image"),
        ],
        "outputs": {
            "mask": f"{run}.hidden",
            "ids_restore": tap("$mask_noise", apply=(["argsort", 1], ["argsort", 1])),
            "latent": _tokens(old, "latent", f"{run}.latent", 1 + int(patches * (1 - ratio)), 1),
            "latent_cls": tap(f"{run}.latent", ":", 0),
            "pred": _tokens(old, "pred", f"{run}.pixels", patches, 4),
            "loss": "$run.0",
            "full_tokens": _tokens(old, "full_tokens", "$full", patches, 4, 1),
            "full_cls": tap("$full", ":", 0),
        },
    }  # fmt: skip


def _encoder(old: Old) -> dict[str, Any]:
    """An encoder of MoCo v3, iBOT or DINO: whichever of these outputs the case has."""
    other = "image_other" in old.facts["inputs"]
    steps = [call("model", VIT, "$state", old.config.get("num_heads")), call("clean", "$model", "$image")]
    outputs: dict[str, Any] = {"cls": tap("$clean", ":", 0)}
    if "tokens" in old.shapes:
        outputs["tokens"] = _tokens(old, "tokens", "$clean", _patches(old), 3, 1)
    inputs = _images(old)
    if "mask" in old.facts["inputs"]:
        inputs["mask"] = _masked(old)
        steps.append(call("masked", "$model", "$image", masked="$mask"))
        outputs["masked_cls"] = tap("$masked", ":", 0)
        outputs["masked_tokens"] = _tokens(old, "masked_tokens", "$masked", _patches(old), 3, 1)
    if "last_attention_cls" in old.shapes:
        steps.append(call("attention", "$model.attention", "$image"))
        first = [0] if len(old.shapes["last_attention_cls"]) == 2 else [f":{old.shapes['last_attention_cls'][0]}"]
        outputs["last_attention_cls"] = tap("$attention", *first)
    if other:
        steps.append(call("other", "$model", "$image_other"))
        outputs["other_size_cls"] = tap("$other", ":", 0)
        if "other_size_tokens" in old.shapes:
            count = _patches(old, "image_other")
            outputs["other_size_tokens"] = _tokens(old, "other_size_tokens", "$other", count, 1, 1)
    if "inter_cls" in old.shapes:
        layers = list(range(-old.shapes["inter_cls"][0], 0))
        steps += [call("last", "$model.hidden", "$image", layers), call("stacked", "torch:stack", "$last")]
        steps.append(call("inter", "$model.norm", "$stacked"))
        outputs["inter_cls"] = tap("$inter", ":", 0, 0)
    return {"inputs": inputs, "steps": steps, "outputs": outputs}


def _tables(old: Old) -> dict[str, Any]:
    width, grid = old.config["embed_dim"], old.config["grid"]
    kinds = [kind for kind in ("mae", "mocov3") if kind in old.shapes]
    outputs = {}
    for kind in kinds:
        step, channels = _part(old, kind, 1 + grid**2, 5)
        outputs[kind] = tap(f"${kind}", 0, f"::{step}", f":{channels}")
    steps = [call(kind, "models.layers.pos_embed:sincos_table", width, grid, kind) for kind in kinds]
    return {"steps": steps, "outputs": outputs}


def _head(old: Old) -> dict[str, Any]:
    return {
        "inputs": {"tokens": old.input("tokens")},
        "steps": [call("head", "models.layers.dino:Head.from_official", "$state"), call("out", "$head", "$tokens")],
        "outputs": {"out": "$out"},
    }


def _moco_heads(old: Old) -> dict[str, Any]:
    inputs, hidden, outputs = (old.config[name] for name in ("in", "hidden", "out"))
    names = {name: name for name in old.names if not name.endswith("num_batches_tracked")}
    return {
        "inputs": {"feature": old.input("feature")},
        "steps": [
            call("projector", "models.dmt.teachers:mlp", inputs, hidden, outputs, 3),
            call("predictor", "models.dmt.teachers:mlp", outputs, hidden, outputs, 2),
            call("heads", "torch.nn:ModuleDict", {"projector": "$projector", "predictor": "$predictor"}),
            call("loaded", "models.layers.state_dicts:load_official", "$heads", "$state", names, "MoCo v3's heads"),
            call("projection", "$projector", "$feature"),
            call("prediction", "$predictor", "$projection"),
        ],
        "outputs": {"projection": "$projection", "prediction": "$prediction"},
    }


def _contrast(old: Old) -> dict[str, Any]:
    loss, temperature = "models.dmt.teachers:contrastive_loss", old.config["T"]
    return {
        "inputs": {name: old.input(name) for name in ("q1", "q2", "k1", "k2")},
        "steps": [
            call("first", loss, "$q1", "$k2", temperature),
            call("second", loss, "$q2", "$k1", temperature),
            call("loss", "torch:add", "$first", "$second"),
        ],
        "outputs": {"loss_q1_k2": "$first", "loss_q2_k1": "$second", "loss": "$loss"},
    }


def _ibot_loss(old: Old) -> dict[str, Any]:
    config, inputs = old.config, {"mask": _masked(old)}
    (temperature,) = {value for name, value in config.items() if name.startswith(("teacher_temp", "patch_temp"))}
    for name in ("student_cls", "student_local_cls", "teacher_cls", "student_patch", "teacher_patch"):
        inputs[name] = old.input(name)
    for name in ("center", "center2"):  # "0.1*fill.values(...)"
        scale = re.match(r"([\d.]+) *\*", str(old.facts["inputs"][name]))
        inputs[name] = old.input(name, ["mul", float(scale[1]) if scale else 0.1])
    options = {"student": config["student_temp"], "teacher": temperature, "momentum": config["center_momentum"]}
    crops = config["global_crops"] + config["local_crops"]
    return {
        "inputs": inputs,
        "steps": [
            call("ibot", "models.layers.dino:Loss", old.shape("center")[-1], **options),
            call("centre", "$ibot.centre.copy_", "$center"),
            call("patch_centre", "$ibot.patch_centre.copy_", "$center2"),
            call("student", "torch:cat", ["$student_cls", "$student_local_cls"]),
            call("crops", "$ibot", "$student", "$teacher_cls", crops),
            call("masked", "$ibot.patches", "$student_patch", "$teacher_patch", "$mask"),
            {"name": "cls", "of": "$crops", "apply": [["mul", config["lambda1"]]]},
            {"name": "patch", "of": "$masked", "apply": [["mul", config["lambda2"]]]},
            call("loss", "torch:add", "$cls", "$patch"),
        ],
        "outputs": {
            "cls": "$cls",
            "patch": "$patch",
            "loss": "$loss",
            "center_after": "$ibot.centre",
            "center2_after": "$ibot.patch_centre",
        },
    }


# --- ancestors: teacher and student in one state dict, by tests/parity/dmt.py -----------------------------------------


def _heads(facts: object, usual: int | None = None) -> int | None:
    """Heads of an encoder: of a dict, or of a text with (width, depth, heads)."""
    if isinstance(facts, Mapping):
        return facts.get("heads", facts.get("num_heads", usual))
    said = re.search(r"\(\d+, *\d+, *(\d+)\)", str(facts))
    return int(said[1]) if said else usual


def _autoencoder(old: Old, which: str) -> dict[str, Any]:
    """Heads of an encoder and of its decoder, which has one for 32 channels, as all of G2SD's do, unless it is said."""
    facts, heads = old.config[which], old.names[f"{which}.decoder_embed.weight"][0] // 32
    if isinstance(facts, Mapping):
        heads = facts.get("decoder_heads", facts.get("decoder_num_heads", heads))
    elif said := re.search(r"decoder.* (\d+) heads", str(facts)):
        heads = int(said[1])
    return {"heads": _heads(facts), "decoder_heads": heads}


def _g2sd(old: Old) -> dict[str, Any]:
    tokens = 1 + _patches(old, prefix="student.")
    seen = 1 + int((tokens - 1) * (1 - old.config["mask_ratio"]))
    counts = {"student_encoder_pred": seen, "target_encoder": seen}
    counts |= {"student_decoder_pred": tokens, "target_decoder": tokens}
    return {
        "code": "g2sd",
        "inputs": _images(old),
        "settings": {
            "teacher": _autoencoder(old, "teacher"),
            "student": _autoencoder(old, "student"),
            "mask_ratio": old.config["mask_ratio"],
            "teacher_decoder_block": old.config["teacher_decoder_block"],
            "relation_heads": old.config.get("relation_heads", 4),
            "parts": {name: _part(old, name, count, 4) for name, count in counts.items()},
        },
    }


def _dmae(old: Old) -> dict[str, Any]:
    config = old.config
    return {
        "code": "dmae",
        "inputs": _images(old),
        "settings": {
            "teacher": {"heads": _heads(config["teacher"]), "aligned_block": config["teacher"]["aligned_block"]},
            "student": _autoencoder(old, "student") | {"aligned_block": config["student"]["aligned_block"]},
            "mask_ratio": config["mask_ratio"],
            "normalise": config.get("norm_pix_loss", False),
            "parts": {"pred": _part(old, "pred", _patches(old, prefix="student."), 4)},
        },
    }


def _tinymim(old: Old) -> dict[str, Any]:
    usual = old.names["student.cls_token"][-1] // 32
    settings = {"teacher": _heads(old.config["teacher"]), "student": _heads(old.config["student"], usual)}
    return {"code": "tinymim", "inputs": _images(old), "settings": settings}
