"""SIC-CADS' cases of version 2, recorded from mala-lab/SIC-CADS at c9f28e1."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import Old, call

MODEL = "models.sic_cads.model:"
TAU = {"lvis": 50.0, "coco": 20.0}  # logit scale by the configuration
CROSS_DATASET = 0.8  # share of the text branch of a foreign vocabulary


def parity(old: Old) -> dict[str, Any]:
    """The calls and taps of any case, by the authors' function that it recorded."""
    for start, made in {
        "mlr_heads": _heads,
        "mlr_losses": _losses,
        "mlr_metrics": _recognition,
        "mlr": _recogniser,  # a whole recogniser, of any vocabulary and images
        "refine_cascade": _refinement,
        "refine_res5": _refinement,
        "zero_shot_classifier": _classifier,
        "eval_ov_coco": _coco,
        "eval_ov_lvis": _lvis,
    }.items():
        if old.facts["case"].startswith(start):
            return made(old)
    raise ValueError(f"{old.folder}: {old.facts['case']}")


def _affine(text: str) -> list[Any]:
    """The methods of "2*fill.values(...)-2" and of "sigmoid(fill.values(...))"."""
    scale = re.findall(r"(-?[\d.]+)\s*\*\s*fill", text)
    shift = re.findall(r"fill\.values\([^)]*\)\s*([+-]\s*[\d.]+)", text)
    methods: list[Any] = [["mul", float(scale[0])]] if scale else []
    methods += [["add", float(shift[0].replace(" ", ""))]] if shift else []
    return methods + (["sigmoid"] if "sigmoid(fill" in text else [])


def _filled(old: Old, key: str, fill: str = "") -> dict[str, Any]:
    """An input, with the methods of its description."""
    return old.input(key, *_affine(old.facts["inputs"][key]["how"]), fill=fill)


def _many_hot(labels: list[list[int]], classes: int) -> dict[str, Any]:
    return {"value": [[c in set(row) for c in range(classes)] for row in labels]}


def _novel(old: Old) -> dict[str, Any]:
    novel = set(old.facts["novel_class_indices"])
    return {"value": [c in novel for c in range(old.config["num_classes"])]}


def _heads(old: Old) -> dict[str, Any]:
    config, maps = old.config, [name for name in old.facts["inputs"] if re.fullmatch(r"p\d", name)]
    inputs = {name: old.input(name) for name in maps} | {"novel": _novel(old)}
    width, dim = sum(old.shape(name)[1] for name in maps), old.names["text_embedding.weight"][1]
    layers = {"shared": "mlr_lin", "to_text": "mlr_lin2", "to_image": "image_embedding"}
    ours = {f"{name}.{kind}": f"{official}.{kind}" for name, official in layers.items() for kind in ("weight", "bias")}
    official = {name: f"$state.{name}" for name in ours.values()}  # of a whole checkpoint only these are read
    steps = [
        call("heads", f"{MODEL}Heads", width, dim, config["levels"]),
        call("loaded", "models.layers.state_dicts:load_official", "$heads", official, names=ours, what="the heads"),
        call("e", "$heads", [f"${name}" for name in maps]),
        {"name": "table", "of": "$state.text_embedding.weight", "apply": [["transpose", 0, 1]]},
        call("share", f"{MODEL}text_share", "$novel", config["lambda_base"], config["lambda_novel"]),
    ]
    for i, branch in enumerate(("text", "image")):
        steps += [
            call(f"cosines_{branch}", "torch:matmul", f"$e.{i}", "$table"),
            call(f"s_{branch}", f"{MODEL}pool", f"$cosines_{branch}", config["levels"]),
            call(f"batch_{branch}", f"{MODEL}normalise", f"$s_{branch}", "batch"),
            call(f"each_{branch}", f"{MODEL}normalise", f"$s_{branch}"),
        ]
    steps += [
        call("p_batch", f"{MODEL}fuse", "$batch_text", "$batch_image", "$share"),
        call("p_each", f"{MODEL}fuse", "$each_text", "$each_image", "$share"),
        call("p_cross", f"{MODEL}fuse", "$batch_text", "$batch_image", CROSS_DATASET),
    ]
    outputs = {"e_text": "$e.0", "e_image": "$e.1", "s_text": "$s_text", "s_image": "$s_image"}
    outputs |= {"p_mmlr_batch": "$p_batch", "p_mmlr_per_image": "$p_each", "p_cross_batch": "$p_cross"}
    return {"inputs": inputs, "steps": steps, "outputs": outputs}


def _losses(old: Old) -> dict[str, Any]:
    classes, facts = old.config["num_classes"], old.facts["inputs"]
    base = set(old.config["base_class_indices"])
    scale = _affine(facts["scores"]["how"])
    kinds = {"rank_box": ("box_labels", "$base"), "rank_image": ("image_labels", None)}
    kinds["rank_box_all_classes"] = ("box_labels", None)
    inputs = {name: _many_hot(facts[name], classes) for name in ("box_labels", "image_labels")}
    inputs["base"] = {"value": [c in base for c in range(classes)]}
    inputs |= {name: old.input(name) for name in ("student", "teacher")}
    steps, outputs = [call("differentiate", "torch:set_grad_enabled", True)], {"kd": "$kd"}
    for name, (labels, columns) in kinds.items():
        inputs[f"{name}_scores"] = old.input("scores", *scale, "requires_grad_", fill="input:scores")
        steps += [
            call(name, f"{MODEL}rank_loss", f"${name}_scores", f"${labels}", columns),
            call(f"{name}_grad", "torch.autograd:grad", f"${name}", f"${name}_scores"),
        ]
        outputs |= {name: f"${name}", f"{name}_grad": f"${name}_grad.0"}
    unit = "torch.nn.functional:normalize"
    steps += [call(f"{name}_unit", unit, f"${name}", dim=-1) for name in ("student", "teacher")]
    steps.append(call("kd", f"{MODEL}distillation_loss", "$student_unit", "$teacher_unit"))
    return {"inputs": inputs, "steps": steps, "outputs": outputs}


def _recognition(old: Old) -> dict[str, Any]:
    """Average precision; 100 times -1, the authors' mark, for a class without positives."""
    how = old.facts["inputs"]["labels"]["how"]
    share, limit = re.findall(r"\+\s*([\d.]+)\s*\*.*>\s*([\d.]+)", how)[0]
    columns = [int(n) for n in re.findall(r"column (\d+) set to 0", how)]
    inputs = {"scores": old.input("scores"), "labels": old.input("labels"), "columns": {"value": columns}}
    steps: list[dict[str, Any]] = [
        {"name": "part", "of": "$scores", "apply": [["mul", float(share)]]},
        call("sum", "torch:add", "$labels", "$part"),
        {"name": "above", "of": "$sum", "apply": [["gt", float(limit)]]},
        call("truth", "torch:index_fill", "$above", 1, "$columns", False),
        {"name": "labels_array", "of": "$truth", "apply": ["cpu", "numpy"]},
        {"name": "scores_array", "of": "$scores", "apply": ["sigmoid", "cpu", "numpy"]},
        call("array", "evaluation.metrics.detection:recognition_ap", "$labels_array", "$scores_array"),
        call("ap", "torch:from_numpy", "$array"),
        call("marked", "torch:nan_to_num", "$ap", nan=-100.0),
        call("mean", "torch:nanmean", "$ap"),
    ]
    if not columns:
        inputs.pop("columns")
        steps[3:4] = [{"name": "truth", "of": "$above"}]
    return {"inputs": inputs, "steps": steps, "outputs": {"ap": "$marked", "mean": "$mean"}}


def _recogniser(old: Old) -> dict[str, Any]:
    """A whole recogniser, with statistics of its maps: by `tests/parity/sic_cads.py`."""
    config, facts = old.config, old.facts
    image = ["round", ["clamp", 0, 255]]
    pixels = [["mul", 50], ["add", 127.5], *image, ["unsqueeze", 0]]
    inputs = {"image": {"shape": facts["inputs"]["image"]["shape"], "apply": pixels}, "novel": _novel(old)}
    boxes = True
    if "train_losses_input" in facts:
        text = facts["train_losses_input"]
        shape, labels = ([int(n) for n in found.split(",")] for found in re.findall(r"\[([\d, ]+)\]", text)[:2])
        inputs["train"] = {"shape": shape, "apply": pixels}
        inputs["positives"], boxes = _many_hot([labels], config["num_classes"]), "boxes" in text
    best = min(old.shapes.get("top20_student", [20])[-1], config["num_classes"])
    return {
        "code": "recogniser",
        "inputs": inputs,
        "recorded": facts.get("train_losses", {}),
        "settings": {
            "lambda_base": config["lambda_base"],
            "lambda_novel": config["lambda_novel"],
            "levels": config["levels"] if config["multi_scale"] else 1,
            "tau": TAU["coco" if "coco" in config["file"] else "lvis"],
            "size": config["inference_resolution"],
            "share": CROSS_DATASET,
            "boxes": boxes,
            "best": best,
        },
    }


def _refinement(old: Old) -> dict[str, Any]:
    """The authors' detectors before and after the refinement: by `tests/parity/sic_cads.py`."""
    config, stages = old.config, old.config.get("stages")
    inputs = {name: _filled(old, name) for name in old.facts["inputs"] if name not in ("logits", "deltas", "boxes")}
    inputs["boxes"] = old.input("boxes", "sigmoid")
    for name in ("logits", "deltas"):
        names = [name] if stages is None else [f"{name}{k}" for k in range(stages)]
        inputs |= {key: _filled(old, name, f"input:{key}") for key in names}
    weights = config["box_weights"] if stages else [config["box_weights"]]
    settings = {name: config[name] for name in ("gamma", "score_thresh", "nms_thresh", "topk", "image_size")}
    return {"code": "refinement", "inputs": inputs, "settings": settings | {"stages": stages, "box_weights": weights}}


def _classifier(old: Old) -> dict[str, Any]:
    config, names = old.config, ("zs_weight", "x", "classifier")
    ours = {name: name for name in old.names}
    return {
        "inputs": {name: old.input(name) for name in names},
        "steps": [
            call("layer", "toy.encoders.detector:ZeroShotClassifier", config["input"], "$zs_weight",
                 config["temperature"]),
            call("loaded", "models.layers.state_dicts:load_official", "$layer", "$state", ours, "the classifier"),
            call("logits", "$layer", "$x"),
            call("custom", "$layer", "$x", "$classifier"),
        ],
        "outputs": {"logits": "$logits", "logits_custom": "$custom"},
    }  # fmt: skip


def _coco(old: Old) -> dict[str, Any]:
    return {"code": "coco", "recorded": old.facts["results"]}


def _lvis(old: Old) -> dict[str, Any]:
    return {"code": "lvis", "recorded": old.facts["results"]}


# --- recipe cases -----------------------------------------------------------------------------------------------------


def recipe(facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe case with numbers in place of sentences."""
    settings, expected = dict(facts["settings"]), dict(facts["expected"])
    tolerance = facts.get("tolerance", {})
    if facts["kind"] in ("groups", "schedule") and "threshold" not in settings:
        expected = {config: want | _configured(config) for config, want in expected.items()}
    if "losses_of_each_step" in expected:
        width = int(re.findall(r"'input:teacher', \(3, (\d+)\)", settings["teacher"])[0])
        size = [int(n) for n in re.findall(r"256, \(([\d, ]+)\)", settings["batch_i"])[0].split(",")]
        settings |= {"teacher_width": width, "images": size} | _configured(settings["config"])
        tolerance = {name: float(text.split()[-1]) for name, text in tolerance.items()}
    if "factor_of_the_others" in expected:
        text = settings["pictures"]  # "... the first five have the classes 0 1 | 0 | 0 0 2; 1995 have class 0; ..."
        shown = re.findall(r"classes ([\d |]+)(?=;)", text)[0]
        many = int(re.findall(r"; (\d+) have class", text)[0])
        last = re.findall(r"have (\d+ and \d+)", text)[0]
        settings |= {"first": [[int(c) for c in part.split()] for part in shown.split("|")], "with_class_0": many}
        settings["last"] = [[int(c) for c in last.split(" and ")]] * len(expected["factor_of_the_last_three"])
    if "s_and_size" in expected:
        ours = {name: dict(zip(("crop", "size"), pair, strict=True)) for name, pair in expected["s_and_size"].items()}
        expected["s_and_size"] = {name: want | _configured(name) for name, want in ours.items()}
    if facts["kind"] == "metric":
        settings["side"] = int(re.findall(r"(\d+) x \d+", settings["images"])[0])
    if facts["kind"] == "selection":
        for name in ("gamma", "lambda_base_novel", "score_threshold", "detections_per_image"):
            own = {what: {"value": value} | _configured(what) for what, value in expected[name].items()}
            expected[name] = own
    return facts | {"settings": settings, "expected": expected, "tolerance": tolerance}


def _configured(name: str) -> dict[str, Any]:
    """The data set of a configuration by the authors' name, "ovmlr_coco_base_caption" or "OV-LVIS"; built: by us."""
    name = name.lower()
    dataset = "detection/ov-coco" if "coco" in name else "detection/ov-lvis"
    return {"dataset": dataset, "captions": "coco" in name, "built": "21k" not in name}
