"""H-ViT's cases of version 2, of computationalpathologygroup/hvit at 444bb72 and clemsgrs/hs2p at f51b276."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from . import Old, call, tap

MODEL, SLIDES, DINO = "models.hvit.model:", "models.hvit.slides:", "models.layers.dino:"
NUMBER = r"\d+(?:\.\d+)?(?:e-?\d+)?"


def parity(old: Old) -> dict[str, Any]:
    """The calls and taps of any case, by the authors' function or class."""
    for name, made in {
        "vision_transformer.vit": _encoder,
        "source.models": _levels,
        "DINOHead": _dino,
        "LossFactory": _losses,
        "get_metrics": _metrics,
        "segmentTissue": _tiling,
        "attention_visualization": _heatmap,
    }.items():
        if name in old.facts["official"]:
            return made(old)
    raise ValueError(f"{old.folder}: {old.facts['official']}")


def step(name: str, of: str, *apply: str | list) -> dict[str, Any]:
    """A step that applies methods to a result."""
    return {"name": name, "of": of, "apply": list(apply)}


def _first(old: Old, name: str, of: str) -> Any:
    """The first tokens or channels of a result, as many as were recorded."""
    return tap(of, *(f":{n}" for n in old.shapes[name]))


def _encoder(old: Old) -> dict[str, Any]:
    config, shape = old.config, old.shape("x")
    region = "phi.0.weight" in old.names
    grid = shape[2:] if region else [side // config["patch_size"] for side in shape[2:]]
    inputs, given = {"x": old.input("x")}, ["$x"]
    if config["mask_attn"]:
        inputs["keep"] = old.input("pct", ["clamp", 0, 1], ["gt", 0], fill="input:pct")
        given.append("$keep")
    kind = "RegionEncoder" if region else "PatchEncoder"
    blocks = [name for name in old.shapes if re.fullmatch(r"block\d+", name)]
    return {
        "inputs": inputs,
        "steps": [
            call("encoder", f"{MODEL}{kind}.from_official", "$state", config["num_heads"]),
            *({"name": name, "watch": f"$encoder.blocks.{name.removeprefix('block')}"} for name in blocks),
            call("positions", "models.layers.pos_embed:resize_pos_embed", "$encoder.pos_embed", grid),
            call("tokens", "$encoder.tokens", "$x"),
            call("run", "$encoder.forward_intermediates", *given),
            call("cls", "$encoder", *given),
        ],
        "outputs": {
            "pos_embed_interpolated": _first(old, "pos_embed_interpolated", "$positions"),
            "tokens": _first(old, "tokens", "$tokens"),
            **{name: _first(old, name, f"${name}.0") for name in blocks},
            "last_attention_cls_row": "$run.1.attention",
            "cls": "$cls",
        },
    }


def _levels(old: Old) -> dict[str, Any]:
    """The slide level alone, with the region level, or with both levels below it, as the case has tensors of them."""
    config = old.config
    position = config.get("slide_pos_embed") or {}
    kind = None if not position.get("use") else "learned" if position["learned"] else "sine"
    build = call("model", f"{MODEL}HViT.from_official", "$state", config.get("task", "classification"), position=kind)
    inputs, masks, tissue, steps, below = {"x": old.input("x")}, [], {}, [build], "$x"
    if config.get("mask_attn"):
        inputs["keep"] = {"fill": "input:pct", "shape": old.shape("pct")[:2], "apply": [["clamp", 0, 1], ["gt", 0]]}
        masks, tissue = ["$keep"], {"tissue": "$shares"}
        steps.append(step("shares", "$keep", ["unsqueeze", 0], ["unsqueeze", -1]))
    if any(name.startswith("vit_patch.") for name in old.names):
        steps.append(call("patches", "$model.embed_patches", below))
        below = "$patches"
    if any(name.startswith("vit_region.") for name in old.names):
        steps.append(call("regions", "$model.embed_regions", below, *masks))
        below = "$regions"
    steps += [
        step("slide", below, ["unsqueeze", 0]),
        call("run", "$model.slide.forward_intermediates", "$slide"),
        step("input", "$x", ["unsqueeze", 0]),
        call("logits", "$model", "$input", **tissue),
    ]
    outputs: dict[str, Any] = {name: f"$run.1.{name}" for name in ("phi", "positioned", "transformer")}
    outputs |= {"attention": "$run.1.pooling", "embedding": "$run.1.slide", "logits": "$logits"}
    if "patch_embeddings" in old.shapes:
        outputs["patch_embeddings"] = _first(old, "patch_embeddings", "$patches")
    outputs["region_embeddings"] = "$regions"
    made = {"inputs": inputs, "steps": steps, "outputs": outputs, "recorded": {}}
    if "mse_loss" in old.shapes:
        _gradients(old, made)
    made["outputs"] = {name: where for name, where in outputs.items() if name in old.shapes or "*" in name}
    return made


def _gradients(old: Old, made: dict[str, Any]) -> None:
    """The loss and its gradients: slices of some, the norms of all."""
    facts = old.facts["outputs"]
    made["inputs"]["grade"] = {"value": [int(float(re.findall(f"and ({NUMBER})", facts["mse_loss"]["meaning"])[0]))]}
    made["steps"] += [
        call("mse_loss", f"{MODEL}loss", "regression", "$logits", "$grade"),
        {"name": "grad", "backward": "$mse_loss", "of": "$model"},
    ]
    made["outputs"]["mse_loss"] = "$mse_loss"
    for name in old.shapes:
        if name.startswith("grad."):
            slices = re.findall(r"slice\(([^()]*)\)", facts[name]["meaning"])
            at = [":".join(n.strip().replace("None", "") for n in one.split(",")[:2]) for one in slices]
            made["outputs"][name] = tap(f"${name}", *at)
    if "grad_norms" in old.shapes:
        norms = load_file(old.folder / "outputs.safetensors")["grad_norms"]
        # a softmax does not see a bias of its scores: what is rounding is compared in the list of all norms alone
        own = {n: float(norm) for n, norm in zip(old.names, norms, strict=True) if norm > 1e-6 * norms.max()}
        made["recorded"] |= {f"grad:{name}": norm for name, norm in own.items()}
        made["outputs"]["grad:*"] = {"each": "$grad", "apply": ["norm"]}
        made["steps"].append(call("norms", "torch:_foreach_norm", [f"$grad.{name}" for name in old.names]))
        made["steps"].append(call("grad_norms", "torch:stack", "$norms"))
        made["outputs"]["grad_norms"] = "$grad_norms"


def _dino(old: Old) -> dict[str, Any]:
    config = old.config
    temperatures = {"student": config["student_temp"], "teacher": config["teacher_temp"]}
    made: dict[str, Any] = {
        "inputs": {name: old.input(name) for name in ("x", "student", "teacher")},
        "steps": [
            call("network", f"{DINO}Head.from_official", "$state"),
            call("head", "$network", "$x"),
            call("loss", f"{DINO}Loss", config["out_dim"], **temperatures, momentum=config["center_momentum"]),
        ],
        "outputs": {"head": _first(old, "head", "$head")},
    }
    for i in range(sum(name.startswith("loss_epoch") for name in old.shapes)):
        names = {"loss": f"loss_epoch{i}", "centre": f"center_after{i + 1}"}
        made["steps"] += [
            call(names["loss"], "$loss", "$student", "$teacher", config["ncrops"]),
            step(names["centre"], "$loss.centre", "clone"),
        ]
        made["outputs"] |= {name: f"${name}" for name in names.values()}
    # "20 epochs of 5 steps: lr (0.0005 -> 1e-6, 4 warm-up epochs), weight decay (0.04 -> 0.4), teacher momentum (...)"
    lengths, _, ramps = config["schedules"].partition(":")
    epochs, steps = (int(n) for n in re.findall(r"\d+", lengths))
    for name, ramp in zip(("lr", "wd", "momentum"), re.findall(r"\(([^()]*)\)", ramps), strict=True):
        base, final, *warmup = (float(n) for n in re.findall(NUMBER, ramp))
        made["steps"].append(call(f"{name}_schedule", f"{DINO}cosine", base, final, epochs, steps, int(sum(warmup))))
        made["outputs"][f"{name}_schedule"] = f"${name}_schedule"
    return made


def _drawn(old: Old, key: str) -> list[str | list]:
    """What is applied to an input "a*fill.values(...) + b"; "clip(round(...), low, high)" are integers."""
    recipe = old.facts["inputs"][key]["recipe"]
    apply: list[str | list] = []
    if scale := re.search(f"({NUMBER}) ?\\* ?fill", recipe):
        apply.append(["mul", float(scale[1])])
    if offset := re.search(rf"fill\.values\([^()]*(?:\([^()]*\)[^()]*)*\) \+ ({NUMBER})", recipe):
        apply.append(["add", float(offset[1])])
    return apply + (_rounded(old, key) if "preds" not in recipe else [])


def _rounded(old: Old, key: str) -> list[str | list]:
    """What is applied to round and clip, where its recipe says so."""
    recipe = old.facts["inputs"][key]["recipe"]
    bounds = re.search(rf", ({NUMBER}), ({NUMBER})\)", recipe.partition("clip")[2])
    return ["round", ["clamp", float(bounds[1]), float(bounds[2])], "long"] if bounds else []


def _losses(old: Old) -> dict[str, Any]:
    classes = old.config["num_classes"]
    losses = {
        "cross_entropy": ("classification", "$logits"),
        "mse": ("regression", "$regression_logits"),
        "ordinal_bce": ("ordinal", "$ordinal_logits"),
        "coral": ("coral", "$ordinal_logits"),
        "corn": ("corn", "$ordinal_logits"),
    }
    predicted = {
        "pred_argmax": losses["cross_entropy"],
        "pred_ordinal": losses["ordinal_bce"],
        "pred_corn": losses["corn"],
        "pred_regression": losses["mse"],
    }
    return {
        "inputs": {name: old.input(name, *_drawn(old, name)) for name in old.facts["inputs"]},
        "steps": [
            call("ordinal_labels", f"{MODEL}extended", "$label", classes),
            *(call(n, f"{MODEL}loss", head, logits, "$label", classes) for n, (head, logits) in losses.items()),
            *(call(n, f"{MODEL}predict", head, logits, classes) for n, (head, logits) in predicted.items()),
        ],
        "outputs": {"labels": "$label", **{name: f"${name}" for name in ("ordinal_labels", *losses, *predicted)}},
    }


def _metrics(old: Old) -> dict[str, Any]:
    classes = old.config["num_classes"]
    weight = re.search(f"\\+ ({NUMBER})\\*onehot", old.facts["inputs"]["logits"]["recipe"])
    assert weight, "logits lean to the label"
    return {
        "inputs": {
            "label": old.input("label", *_drawn(old, "label")),
            "noise": old.input("noise", *_drawn(old, "noise")),
            "logits": old.input("logits", "double"),
            "votes": old.input("votes", *_drawn(old, "votes"), "t"),
        },
        "steps": [
            call("moved", "torch:add", "$label", "$noise"),
            step("preds", "$moved", *_rounded(old, "noise")),
            call("kappa", "models.hvit.recipe:quadratic_kappa", "$label", "$preds"),
            call("confusion", "evaluation.metrics.landcover:confusion", "$label", "$preds", classes),
            call("onehot", "torch.nn.functional:one_hot", "$label", classes),
            call("leaning", "torch:add", "$logits", "$onehot", alpha=float(weight[1])),
            step("probabilities", "$leaning", ["softmax", 1]),
            call("percent", "evaluation.metrics.radiology:mean_auroc", "$onehot", "$probabilities"),
            step("auc", "$percent", ["__truediv__", 100]),
            call("plain", "models.hvit.recipe:voted", "$votes", None, False),
            call("custom", "models.hvit.recipe:voted", "$votes", None, True),
            call("both", "torch:stack", ["$plain", "$custom"], 1),
        ],
        "outputs": {
            "labels": "$label",
            "preds": "$preds",
            "quadratic_kappa": "$kappa",
            "auc_ovr": "$auc",
            "confusion": "$confusion",
            "votes": tap("$votes", apply=("t",)),
            "vote_result": "$both",
        },
    }


def tiling(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Tiling` for HS2P's settings."""
    segmentation, kept = settings.get("seg") or settings["segmentation"], settings["filter"]
    return {
        "region": settings["tile"],
        "mpp": settings["target_spacing"],
        "saturation": segmentation["sthresh"],
        "otsu": segmentation["use_otsu"],
        "median": segmentation["mthresh"],
        "close": segmentation["close"],
        "area": kept["a_t"],
        "hole_area": kept["a_h"],
        "holes": kept["max_n_holes"],
        "drop_holes": settings["drop_holes"],
        "least": settings["tissue_thresh"],
        "padding": settings["use_padding"],
    }


def _tiling(old: Old) -> dict[str, Any]:
    config = old.config
    ratio, size = config["target_spacing"] / config["spacing0"], config["level0"]
    side, unit = int(config["tile"] * ratio), config["filter"]["ref_patch_size"] * ratio
    return {
        "inputs": {"thumbnail": {"stored": "thumbnail", "apply": ["cpu", "numpy"]}},
        "steps": [
            call("tiling", f"{SLIDES}Tiling", **tiling(config)),
            call("mask", f"{SLIDES}tissue_mask", "$thumbnail", "$tiling"),
            call("factors", f"{SLIDES}axis_factors", size, "$mask"),
            call("tiles", f"{SLIDES}find_tiles", "$mask", "$factors", size, side, "$tiling", unit),
            call("order", f"{SLIDES}file_order", "$tiles.0"),
            call("ordered", "$tiles.0.__getitem__", "$order"),
        ],
        "outputs": {
            "mask": "$mask",
            "coords": "$tiles.0",
            "tissue_pct": "$tiles.1",
            "contour": "$tiles.2",
            "coords_file_order": "$ordered",
        },
    }


def _heatmap(old: Old) -> dict[str, Any]:
    """By `tests/parity/hvit.py`: two tokens whose attention differs by less than rounding may swap their ranks."""
    config, given = old.config, old.facts["inputs"]
    blends = {}
    for variant, gamma in config["combos"]:
        name = f"blend_{variant}_gamma{gamma}"
        chosen = re.findall(r"region (\d+), region head (\d+), patch head (\d+)", old.facts["outputs"][name]["meaning"])
        blends[name] = {"variant": variant, "gamma": gamma, "chosen": [[int(n) for n in one] for one in chosen]}
    smooth = config["smoothing_region_and_patch"]
    offset = config["smoothing_region_offset"] * config["region_size"] / 4096 if smooth else 0
    return {
        "code": "heatmap",
        "inputs": {name: old.input(name) for name in given},
        "settings": {
            "corners": [
                [int(n) for n in re.findall(r"saved as (\d+)_(\d+)", facts["recipe"])[0]] for facts in given.values()
            ],
            "smoothed": smooth,
            "step": int(offset),  # pixels between two windows of a region
            "downscale": config["downscale"],
            "blends": blends,
        },
    }


def _head(task: str, encoding: str | None, loss: str) -> str:
    """Our head for the authors' task, encoding of the labels and loss."""
    return {"ce": "ordinal"}.get(loss, loss) if encoding == "ordinal" else task


def recipe(facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe case with numbers and our names in place of sentences and theirs."""
    settings, expected = dict(facts["settings"]), dict(facts["expected"])
    changed: dict[str, Any] = {"settings": settings, "expected": expected}
    match facts["kind"]:
        case "loss":  # "ordinal ce, mean of 24 batches of one"
            settings["losses"] = {}
            for name in expected:
                task, *loss = name.partition(",")[0].split()
                logits = {"ordinal": "logits", "classification": "logits6"}.get(task, task)
                head = _head(task, task, loss[0] if loss else "")
                settings["losses"][name] = {"head": head, "logits": logits, "per_slide": "batches of one" in name}
            settings["gradients"] = {loss: _head("", "ordinal", loss) for loss in ("ce", "coral", "corn")}
        case "preprocess":
            settings["tiling"] = tiling(settings)
        case "schedule" if "left_over_slides" in expected:
            carried = "added to the first step of the next epoch" in expected["left_over_slides"]
            expected["left_over_slides"] = "carry" if carried else "drop"
        case "groups" if "groups" in str(expected):  # "local classification ordinal coral, with weights for ..."
            settings["models"] = {}
            for name in expected:
                variant, task, encoding, loss = name.partition(",")[0].split()
                own = {
                    "method": variant.title(),
                    "head": _head(task, encoding, loss),
                    "weights": "with weights" in name,
                }
                settings["models"][name] = own
        case "groups":
            for level in ("patch_level", "region_level"):
                expected[level] = expected[level].partition(",")[0].split()[0]  # "trained, position table too"
            expected["loss"] = "classification" if expected["loss"].startswith("cross entropy") else expected["loss"]
        case "trajectory":
            settings["method"] = "Local" if settings["model"].startswith("Local") else "Global"
            settings["head"] = _head(settings["task"], settings["label_encoding"], settings["loss"])
            told = {name: text.split() for name, text in facts["tolerance"].items()}  # "relative 1e-3"
            changed["tolerance"] = {name: {kind: float(value)} for name, (kind, value) in told.items()}
    return facts | changed
