"""DPLQ's cases of version 2: caoql98/DPLQ at 3d78bb5, its baselines of caoql98/DCPL, its domain model of RVSA."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from . import Old, call, tap
from .sentences import drawn, seed, step

BASELINES = {"baseline coop": "CoOp", "baseline cocoop": "CoCoOp", "baseline maple": "MaPLe"}


def parity(old: Old) -> dict[str, Any]:
    """The calls and taps of any case, by the authors' class and file."""
    module = old.facts["module"]
    kinds = {start: partial(_baseline, kind) for start, kind in BASELINES.items()}
    kinds |= {"QuaternionLinearAutograd": _quaternion, "CustomCLIP of the official trainer/maple.py": _model}
    for start, made in (kinds | {"MaskedAutoencoderViT": _mae}).items():
        if module.startswith(start):
            return made(old)
    raise ValueError(f"{old.folder}: {module}")


def recipe(facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe case with numbers and steps in place of sentences."""
    settings, expected = facts["settings"], facts["expected"]
    room = {
        name: re.findall(r"([\d.]+(?:e-?\d+)?) (relative|absolute)", text) for name, text in facts["tolerance"].items()
    }
    facts["tolerance"] = {name: {kind: float(n) for n, kind in reversed(found)} for name, found in room.items()}
    if facts["kind"] == "groups":
        expected.pop("line_format", None)
    elif "training" in expected:
        expected["training"] = [step(text) for text in expected["training"]]
        # of a set with one image less than a batch, a batch, and one more
        keeps = "at least a batch" in expected["loader"]["drop_last"]
        expected["loader"]["drop_last"] = ["train" if keeps else "drop", "drop", "drop"]
    elif facts["kind"] == "selection":
        expected["saved_epochs"] = "last" if expected["saved_epochs"].startswith("the last only") else "others"
        expected["test_during_training"] = "after" if "after the last" in expected["test_during_training"] else "each"
        expected["seeds"] = "given" if "given" in expected["seeds"] else "fixed"
        expected["noise"] = "always" if "test time too" in expected["noise"] else "train"
    elif facts["kind"] == "trajectory":
        batch = settings["batch"]
        settings["weights"] = seed(settings["weights"])
        settings["batch"] = batch | {"images": drawn(batch["generator"]) | drawn(batch["images"])}
    return facts


def _input(old: Old, name: str, *apply: str | list) -> dict[str, Any]:
    """An input; these cases name it with the prefix of `fill`."""
    shape = {"shape": old.facts["inputs"][f"input:{name}"]}
    return shape | ({"apply": list(apply)} if apply else {})


def _quaternion(old: Old) -> dict[str, Any]:
    inputs = {key.removeprefix("input:"): {"shape": shape} for key, shape in old.facts["inputs"].items()}
    steps: list[dict[str, Any]] = []
    outputs: dict[str, Any] = {}
    for name, sizes in old.facts["layers"].items():
        width, layer = sizes["in_features"], f"layer_{name}"
        axes = [":"] * (len(inputs[name]["shape"]) - 1)
        steps += [
            call(layer, "models.layers.quaternion:QuaternionLinear", width, sizes["out_features"]),
            call(f"weight_{name}", "torch:stack", [f"$state.{name}.{part}_weight" for part in "rijk"]),
            call(f"set_weight_{name}", f"${layer}.weight.data.copy_", f"$weight_{name}"),
            call(f"set_bias_{name}", f"${layer}.bias.data.copy_", f"$state.{name}.bias"),
            call(f"full_{name}", f"${layer}", f"${name}"),
            {"name": f"half_{name}", "of": f"${name}", "at": [*axes, f"{width // 2}:"]},
            call(f"input_{name}", "torch.nn.functional:pad", f"$half_{name}", [width // 2, 0]),
            call(f"padded_{name}", f"${layer}", f"$input_{name}"),
            call(f"matrix_{name}", "models.layers.quaternion:real_matrix", f"${layer}.weight"),
            {"name": f"loss_{name}", "of": f"$full_{name}", "apply": ["square", "sum"]},
            {"name": f"grad_{name}", "backward": f"$loss_{name}", "of": f"${layer}"},
        ]
        outputs |= {f"{name}.full": f"$full_{name}", f"{name}.zero_padded": f"$padded_{name}"}
        outputs |= {f"{name}.real_matrix": f"$matrix_{name}", f"{name}.grad.bias": f"$grad_{name}.bias"}
        outputs |= {f"{name}.grad.{part}_weight": f"$grad_{name}.weight.{i}" for i, part in enumerate("rijk")}
    if "hamilton" in old.shapes:
        steps.append(call("hamilton", "models.layers.quaternion:hamilton", "$q0", "$q1"))
        outputs["hamilton"] = "$hamilton"
    return {"inputs": inputs, "steps": steps, "outputs": outputs}


def _learner(old: Old, kind: str) -> dict[str, Any]:
    """The step that makes a prompted CLIP."""
    heads = [old.config["vision_heads"], old.config["text_heads"]]
    return call("model", f"models.{kind}.from_official", "$state", ends=old.facts["eot_positions"], heads=heads)


def _trained(old: Old) -> dict[str, Any]:
    """What all prompted CLIPs share: the labels, the loss of the logits, and gradients by the authors' names."""
    labels = old.facts.get("labels") or old.facts["input_rules"]["labels"]
    norms = {f"grad:{name}": norm for name, norm in old.facts.get("train_mode_grad_norms", {}).items()}
    return {
        "inputs": {"image": _input(old, "image"), "labels": {"value": labels}},
        "steps": [
            call("loss", "torch.nn.functional:cross_entropy", "$logits", "$labels"),
            {"name": "own", "backward": "$loss", "of": "$model"},
            call("names", "$model.learner_names"),
            call("grad", "models.layers.state_dicts:official_state", "$own", "$names"),
        ],
        "outputs": {
            "logits": "$logits",
            "loss": "$loss",
            "grad.*": {"each": "$grad"},
            "grad:*": {"each": "$grad", "apply": ["norm"]},
        },
        "recorded": old.norms | norms,
    }


def _baseline(kind: str, old: Old) -> dict[str, Any]:
    made = _trained(old)
    made["steps"] = [_learner(old, f"layers.coop:{kind}"), call("logits", "$model", "$image"), *made["steps"]]
    return made


def _model(old: Old) -> dict[str, Any]:
    made = _trained(old)
    shift = re.search(r"\+ *([\d.]+)", old.facts["input_rules"]["domain tokens"])
    made["inputs"] |= {
        "noise": _input(old, "noise"),
        "domain_tokens": _input(old, "domain_tokens", ["add", float(shift[1]) if shift else 0.5], ["mean", 1]),
    }
    made["steps"] = [
        _learner(old, "dplq.model:DPLQ"),
        call("prompts", "$model.prompts", "$domain_tokens", "$noise"),
        call("encoded", "$model.encode", "$image", "$prompts"),
        call("no_noise", "torch:zeros_like", "$noise"),
        call("silent", "$model", "$image", "$domain_tokens", "$no_noise"),
        call("logits", "$model", "$image", "$domain_tokens", "$noise"),
        *made["steps"],
    ]
    made["outputs"] = {
        "meta_net": "$prompts.bias",
        "ctx": "$prompts.context",
        "shared_ctx": "$prompts.first_image",
        "visual_prompt_first": "$prompts.deep_image.0",
        "visual_prompt_last": "$prompts.deep_image.-1",
        "image_features": "$encoded.0",
        "text_features": "$encoded.1",
        "logits_without_noise": "$silent",
        **made["outputs"],
    }
    return made


def _mae(old: Old) -> dict[str, Any]:
    heads = [old.config.get("heads"), old.config.get("decoder_heads", 16)]

    def part(name: str, of: str) -> dict[str, Any]:
        """The first of the patches' tokens and channels."""
        tokens, channels = old.shapes[name][1:]
        return tap(of, ":", f"1:{1 + tokens}", f":{channels}")

    return {
        "inputs": {"image": _input(old, "image")},
        "steps": [
            call("model", "models.layers.mae:MAE.from_official", "$state", *heads),
            call("latent", "$model.encode", "$image"),
            call("tokens", "$model.decoder", "$latent"),
            call("domain", "models.dplq.model:MAEFeatures", "$model"),
            call("features", "$domain", "$image"),
            call("pixels", "$model.pixels", "$tokens"),
        ],
        "outputs": {
            "latent_cls": tap("$latent", ":", 0),
            "latent_slice": part("latent_slice", "$latent"),
            "tokens_slice": part("tokens_slice", "$tokens"),
            "domain_features": "$features",
            "pixel_prediction_mean": tap("$pixels", ":", "1:", apply=(["mean", 1],)),
        },
    }
