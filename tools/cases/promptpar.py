"""PromptPAR's cases of version 2, recorded from Event-AHU/OpenPAR at 210ff55, folder PromptPAR."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import Old, call, tap

MODEL, CLIP = "models.promptpar.model:", "models.layers.clip_prompting:"
GRID = 16  # patches a side of the parts of a model that a case records alone


def parity(old: Old) -> dict[str, Any]:
    """The calls and taps of any case, by the authors' class and function."""
    config = old.config
    module = config if isinstance(config, str) else config.get("module", "")
    for start, made in {
        "Transformer.build_visual_mask": _masks,
        "visual Transformer": _tower,
        "CLIP.forward_aggregate": _aggregate,
        "TransformerClassifier": _fusion,
        "CEL_Sigmoid": _losses,
        "get_pedestrian_metrics": _metrics,
    }.items():
        if module.startswith(start):
            return made(old)
    return _schedules(old) if "epochs" in config else _whole(old)


def _listed(old: Old, output: str, after: str = "") -> list[int]:
    """The numbers in the brackets of an output's description that follow `after`; [] if there are none."""
    text = old.facts["outputs"].get(output, {}).get("what", "")
    found = re.search(re.escape(after) + r"\s*\[([\d,\s]+)\]", text)
    return [int(n) for n in found[1].split(",")] if found else []


def _filled(old: Old, key: str) -> dict[str, Any]:
    """An input whose shape is in brackets in its description."""
    shape = re.findall(r"\[([\d,\s]+)\]", old.facts["inputs"][key])[0]
    return {"shape": [int(n) for n in shape.split(",")]}


def _small(
    attributes: int, *, embed: int = 8, width: int = 8, layers: int = 1, heads: int = 1, grid: int = GRID,
    dim: int = 64, fusion_heads: int = 1, fusion_layers: int = 1,
) -> list[dict[str, Any]]:  # fmt: skip
    """The parts of a model whose CLIP is as small as a case allows."""
    return [
        call("vision", f"{CLIP}CLIPVisionCfg", layers, width, width // heads, patch_size=14, image_size=14 * grid),
        call("words", f"{CLIP}CLIPTextCfg", 2, 1, width=8, heads=1, layers=1),
        call("clip", f"{CLIP}CLIP", embed, "$vision", "$words", quick_gelu=True),
        call("vit", "timm.models.vision_transformer:VisionTransformer", img_size=16, embed_dim=dim,
             depth=fusion_layers, num_heads=fusion_heads, num_classes=0),
        call("embedded", "torch:zeros", [attributes, 2, 8]),
        call("texts", f"{CLIP}Texts", "$embedded", "$ends"),
    ]  # fmt: skip


def _model(name: str, **settings: Any) -> list[dict[str, Any]]:
    """A model of those parts in eval mode."""
    return [
        call(f"{name}_settings", f"{MODEL}Settings", **{"official_quirks": True, "visual_embed": True} | settings),
        call(f"{name}_made", f"{MODEL}PromptPAR", "$clip", "$texts", None, "$vit", f"${name}_settings"),
        call(name, f"${name}_made.eval"),
    ]


def _ends(attributes: int) -> dict[str, Any]:
    return {"ends": {"value": [1] * attributes}}


def _masks(old: Old) -> dict[str, Any]:
    regions, overlap = (int(re.findall(rf"{name} (\d+)", old.config)[0]) for name in ("div_num", "overlap_row"))
    steps = []
    for name in old.shapes:
        patch, prompts = (int(n) for n in re.findall(r"mask_[a-z](\d+)_p(\d+)", name)[0])
        quirks = name.endswith("_quirk")
        grid = [224 // patch, 224 // patch]
        steps.append(call(name, f"{MODEL}region_mask", grid, prompts, regions, overlap, official_quirks=quirks))
    return {"steps": steps, "outputs": {name: f"${name}" for name in old.shapes}}


def _tower(old: Old) -> dict[str, Any]:
    config, inputs, outputs = old.config, _ends(1), dict[str, Any]()
    sizes = {name: config[name] for name in ("width", "layers", "heads", "grid")}
    steps = _small(1, **sizes)
    steps += [
        call("loaded", "$clip.visual.load_state_dict", "$state", strict=False),
        {"name": "deep", "of": "$state.transformer.prompt_deep", "apply": [["squeeze", 2]]},
    ]
    variants: dict[str, dict[str, Any]] = {"": {}, "_nomask": {"masked": False}, "_nodiv": {"regions": 0}}
    for ending, options in variants.items():
        if f"tokens{ending}" not in old.shapes:
            continue
        key = "tokens_nodiv" if ending == "_nodiv" else "tokens"
        inputs |= {key: _filled(old, key) | {"apply": [["transpose", 0, 1]]}}
        own, run, rows = f"model{ending}", f"run{ending}", _listed(old, f"tokens{ending}", "rows")
        steps += _model(own, prompts=config["vis_prompt"], depth=config["vis_depth"], **options)
        steps += [
            call(f"prompts{ending}", f"${own}.prompts.copy_", "$deep"),
            call(run, f"${own}.tower", f"${key}"),
            call(f"map{ending}", f"${own}.tower_map", f"${run}.1"),
        ]
        outputs[f"tokens{ending}"] = tap(f"${run}.0", ":", rows, apply=(["transpose", 0, 1],))
        outputs[f"rows_norm{ending}"] = tap(f"${run}.0", apply=(["norm", 2, -1], ["transpose", 0, 1]))
        if f"all_class{ending}" in old.shapes:
            steps += [call(f"class{ending}", "torch:index_select", f"${run}.0", 1, f"${own}.class_positions")]
            outputs[f"all_class{ending}"] = f"$class{ending}"
        outputs[f"attention{ending}"] = tap(f"$map{ending}", ":", ":", rows, apply=(["mean", 1],))
    return {"inputs": inputs, "steps": steps, "outputs": outputs}


def _aggregate(old: Old) -> dict[str, Any]:
    """The similarity of each image alone is that of the model as it is meant."""
    config, scalars = old.config, old.facts["scalars"]
    settings = {"threshold": config["ag_threshold"], "prompts": 5}
    norm = {n: f"$state.clip_model.agg_bn.{n}" for n in ("weight", "bias", "running_mean", "running_var")}
    steps = [
        *_small(config["A"], embed=config["E"]),
        *_model("model", **settings),
        *_model("meant", **settings | {"official_quirks": False}),
        call("norm", "$model.agg_bn.load_state_dict", norm, strict=False),
        call("scale", "$model.clip.logit_scale.fill_", scalars["clip_model.logit_scale"]),
        call("temperature", "$model.temperature.fill_", scalars["clip_model.softmax_model.temperature"]),
        call("text", "$model.text_features.copy_", "$text_features"),
        call("similarity", "$model.similarities", "$all_class"),
        call("local", "$model.aggregate", "$similarity.1"),
        call("local_each", "$meant.aggregate", "$similarity.1"),
        call("final", "$model.agg_bn", "$local"),
        call("final_each", "$model.agg_bn", "$local_each"),
        call("training", "$model.agg_bn.train"),
        call("final_training", "$training", "$local"),
    ]
    shapes = {"all_class": [config["B"], 5, config["E"]], "text_features": [config["A"], config["E"]]}
    outputs = {
        "logits_per_image": "$similarity.0",
        "similarity": "$similarity.1",
        "final_similarity_batch": "$final",
        "final_similarity_each": "$final_each",
        "final_similarity_batch_trainbn": "$final_training",
    }
    inputs = {name: {"shape": shape} for name, shape in shapes.items()} | _ends(config["A"])
    return {"inputs": inputs, "steps": steps, "outputs": outputs}


def _fusion(old: Old) -> dict[str, Any]:
    config, outputs = old.config, dict[str, Any]()
    layers, inputs = config["mm_layers"], _ends(config["A"])
    inputs |= {name: _filled(old, name) for name in ("visual_tokens", "text_features")}
    sizes = {"embed": config["embed"], "dim": config["dim"]}
    steps = _small(config["A"], fusion_heads=config["heads"], fusion_layers=max(1, layers), **sizes)
    variants: dict[str, tuple[dict[str, Any], str]] = {
        "": ({"mm_layers": layers}, r"linear_layer\."),
        "_2023": ({"mm_layers": layers, "visual_embed": False}, r"linear_layer\.|visual_embed\."),
        "_linear": ({"mm_layers": 0}, r"blocks\."),
    }
    for ending, (options, absent) in variants.items():
        if f"bn_logits{ending}" not in old.shapes:  # without `visual_embed` embed and dim are equal
            continue
        own, names = f"model{ending}", _own_names(old, absent)
        steps += _model(own, prompts=config["visual_tokens"] - GRID**2 - 1, regions=0, **options)
        loaded = {"names": names, "what": "the authors' fusion", "ignored": "model."}
        steps += [
            call(f"loaded{ending}", "models.layers.state_dicts:load_official", f"${own}", "$state", **loaded),
            call(f"text{ending}", f"${own}.text_features.copy_", "$text_features"),
            call(f"fused{ending}", f"${own}.fuse", "$visual_tokens"),
            call(f"logits{ending}", f"${own}.heads", f"$fused{ending}.0"),
            call(f"bn_logits{ending}", f"${own}.bn", f"$logits{ending}"),
        ]
        outputs[f"bn_logits{ending}"] = f"$bn_logits{ending}"
    if "attention" in old.shapes:
        steps.append(call("map", "models.layers.attend:attention_map", "$fused.1.q", "$fused.1.k"))
        outputs["attention"] = tap("$map", apply=(["mean", 1],))
    outputs |= {"normed_attribute_tokens": "$fused.0", "pre_bn_logits": "$logits"}
    return {"inputs": inputs, "steps": steps, "outputs": outputs}


def _own_names(old: Old, absent: str) -> dict[str, str | list[str]]:
    """Our tensor names to the authors' of a fusion, but for those that begin with `absent`."""
    names: dict[str, Any] = {}
    for official in old.names:
        name = official.removeprefix("model.")
        part, _, kind = name.rpartition(".")
        if part.startswith("weight_layer."):
            names.setdefault(f"heads.{kind}", []).append(official)
        elif not re.match(absent, name):
            names[name] = official
    return names


def _sigmoid(text: str) -> list[str | list]:
    """The methods of "0.02 + 0.9*sigmoid(2*fill.values(...))"."""
    low, span, inner = re.findall(r"([\d.]+)\s*\+\s*([\d.]+)\s*\*\s*sigmoid\((?:([\d.]+)\s*\*)?", text)[0]
    return [["mul", float(inner or 1)], "sigmoid", ["mul", float(span)], ["add", float(low)]]


def _above(text: str) -> list[str | list]:
    """The methods of "(fill.values(...) > 0.5)"."""
    return [["gt", float(re.findall(r">\s*([\d.]+)", text)[0])], "float"]


def _losses(old: Old) -> dict[str, Any]:
    shape, texts = [old.config["B"], old.config["A"]], old.facts["inputs"]
    scale = float((re.findall(r"^([\d.]+)\s*\*", texts["logits"]) or ["1"])[0])
    options = {"reduction": "none"}
    return {
        "inputs": {
            "logits": {"shape": shape, "apply": [["mul", scale], "requires_grad_"]},
            "targets": {"shape": shape, "apply": _above(texts["targets"])},
            "ratio": {"shape": shape[1:], "apply": _sigmoid(texts["ratio"])},
        },
        "steps": [
            call("differentiate", "torch:set_grad_enabled", True),
            call("loss", f"{MODEL}weighted_loss", "$logits", "$targets", "$ratio"),
            call("plain", "torch.nn.functional:binary_cross_entropy_with_logits", "$logits", "$targets", **options),
            call("weights", f"{MODEL}label_weights", "$targets", "$ratio"),
            call("grad", "torch.autograd:grad", "$loss", "$logits"),
        ],
        "outputs": {
            "targets": "$targets",
            "ratio": "$ratio",
            "weights": "$weights",
            "loss": "$loss",
            "loss_unweighted": tap("$plain", apply=(["sum", 1], "mean")),
            "grad_logits": "$grad.0",
        },
    }


TOTALS = {"ma": "mA", "instance_acc": "Acc", "instance_prec": "Prec", "instance_recall": "Rec", "instance_f1": "F1"}
TOTALS |= {"f1_of_mean_precision_and_recall (Rethinking_of_PAR)": "F1 of means"}


def _metrics(old: Old) -> dict[str, Any]:
    percent = (["__truediv__", 100],)
    steps: list[dict[str, Any]] = [
        {"name": name, "of": f"${stored}", "apply": ["cpu", "numpy"]}
        for name, stored in (("labels", "gt"), ("probabilities", "probs"))
    ]
    outputs, recorded = dict[str, Any](), dict[str, float]()
    thresholds = {name.rpartition("_")[2] for name in old.shapes if name.startswith("label_")}
    for i, threshold in enumerate(sorted(thresholds | old.facts.get("results", {}).keys())):
        scores = f"scores{i}"
        steps.append(
            call(scores, "evaluation.metrics.attributes:evaluate", "$labels", "$probabilities", float(threshold))
        )
        for name, own in (("label_ma", "balanced"), ("label_f1", "f1")):
            if f"{name}_{threshold}" in old.shapes:
                outputs[f"{name}_{threshold}"] = tap(f"${scores}.{own}", apply=percent)
        for name, value in old.facts.get("results", {}).get(threshold, {}).items():
            recorded[f"{name} {threshold}"] = value
            outputs[f"{name} {threshold}"] = tap(f"${scores}.totals.{TOTALS[name]}", apply=percent)
    inputs = {name: {"stored": name} for name in ("gt", "probs")}
    return {"inputs": inputs, "steps": steps, "outputs": outputs, "recorded": recorded}


def _schedules(old: Old) -> dict[str, Any]:
    steps = []
    for name in old.shapes:
        lr, warmup = re.findall(r"lr ([\d.e-]+), warm-up (\d+)", old.config[name])[0]
        steps += [
            call(f"{name}_schedule", "models.promptpar.recipe:by_epoch", int(warmup)),
            call(name, f"${name}_schedule", float(lr), old.config["epochs"], 1),
        ]
    return {"steps": steps, "outputs": {name: f"${name}" for name in old.shapes}}


def _whole(old: Old) -> dict[str, Any]:
    """A whole model with its gradients, which are no outputs of a call: by `tests/parity/promptpar.py`."""
    config, facts = old.config, old.facts
    texts, attributes = facts["inputs"], len(facts["sentences"])
    images, context = old.shape("images"), old.names["clip_model.positional_embedding"][0]
    heads = None
    if "vision_heads" in config:
        heads = [config["vision_heads"], config["text_heads"], config.get("fusion_heads", 12)]
    order = facts.get("grad_norm_order")
    if order is None:
        order = re.findall(r"[\w.]+", facts["outputs"]["grad_model_norms"]["what"].removeprefix("order: "))
    slices = {name: shape[-1] for name, shape in old.shapes.items() if name.startswith("grad_prompt_deep")}
    return {
        "code": "whole",
        "fixed": facts["scalars"],
        "inputs": {
            "images": {"shape": images},
            "targets": {"shape": [images[0], attributes], "apply": _above(texts["targets"])},
            "ratio": {"shape": [attributes], "apply": _sigmoid(texts["ratio"])},
            "ids": {"value": [row + [0] * (context - len(row)) for row in texts["token_ids_without_padding"]]},
        },
        "settings": {
            "sentences": facts["sentences"],
            "heads": heads,
            "attention_rows": _listed(old, "last_attention_rows", "query rows"),
            "tokens": _listed(old, "visual_tokens_slice", "tokens"),
            "prompts": _listed(old, "grad_prompt_deep_slice", "prompts"),
            "channels": slices,
            "order": order,
        },
    }


# --- recipe cases -----------------------------------------------------------------------------------------------------

SETS = {"peta": "par/peta", "pa100k": "par/pa100k", "rapv1": "par/rapv1", "rapv2": "par/rapv2", "wider": "par/wider"}
SETS |= {"peta-zs": "par-zs/peta", "rap-zs": "par-zs/rap"}


def recipe(facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe case with numbers in place of sentences."""
    settings, expected = dict(facts["settings"]), dict(facts["expected"])
    tolerance = {name: number for name, text in facts.get("tolerance", {}).items() if (number := _number(text))}
    if facts["kind"] == "groups":
        named = [*expected["names"], *expected["initial_values"]]
        settings["line_format"] = expected.pop("line_format", "")
        settings["dataset"] = SETS[settings["data_set"].lower()]
        settings["release"] = "2025" if any("visual_embed" in name for name in named) else "2023"
        settings["clip"] = f"{settings['clip'].replace('/', '-')}-quickgelu"
    if facts["kind"] == "labels" and "order" in expected:
        text = f"{facts['case']} {settings['what']}".lower()
        settings["dataset"] = next(key for name, key in reversed(SETS.items()) if name in text)
        expected["split"] = int(re.findall(r"element (\d+)", expected["split"])[0])
    elif facts["kind"] == "labels":
        for name, want in expected.items():  # "rapv1 (template 1, stored beside them)"
            texts = "sentences" if "template" in name else "released"
            expected[name] = want | {"dataset": SETS[name.partition(" ")[0]], "texts": texts}
    if facts["kind"] == "preprocess" and "training" in expected:
        expected |= {split: [_step(text) for text in expected[split]] for split in ("training", "test")}
    elif facts["kind"] == "preprocess":
        settings["padded"] = settings["padding"].startswith("none")
        # the grid's tolerance of a padded image is that of nine of ten values
        settings["share"] = 0.9 if "nine of ten" in facts["tolerance"]["grid"] else 1.0
    if facts["kind"] == "selection":
        expected["stops"] = int(re.findall(r"\d+", expected["stops"])[0])
    if facts["kind"] == "trajectory":
        batch = settings["batch"]
        settings["weights"] = {"seed": int(re.findall(r"seed=(\d+)", settings["weights"])[0])}
        shape = re.findall(r"standard_normal\(\(([\d, ]+)\)", batch["images"])[0]
        generator = int(re.findall(r"default_rng\((\d+)\)", batch["generator"])[0])
        settings["batch"] = batch | {"seed": generator, "images": [int(n) for n in shape.split(",")]}
        settings["clip_grad_norm"] = float(_number(settings["clip_grad_norm"]))
    return facts | {"settings": settings, "expected": expected, "tolerance": tolerance}


def _number(text: Any) -> float:
    """The first number of a sentence such as "1e-3 relative", 0.0 where it has none."""
    return float((re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", str(text)) or ["0"])[0])


def _step(text: str) -> list[Any]:
    """The name, numbers and interpolation of a transform: "Resize((224, 224)), bilinear"."""
    name = text.partition("(")[0].split()[0]
    found = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text.replace("black", "0"))]
    if name == "RandomCrop" and len(found) == 1:
        found *= 2
    return [name, found, next((kind for kind in ("bicubic", "bilinear") if kind in text), "")]
