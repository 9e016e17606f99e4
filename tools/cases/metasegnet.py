"""MetaSegNet's cases of version 2, recorded from WangLibo1995/GeoSeg at 9453fe4, the first author's image-only code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import Old, call, numbers, tap

MODEL = "models.metasegnet."


def parity(old: Old) -> dict[str, Any]:
    """The calls and taps of any case, by the authors' module."""
    module = old.facts["module"]
    for start, made in {
        "ft_unetformer(": _network,
        "Decoder of": _decoder,
        "GlobalLocalAttention": _attention,
        "Block (": _block,
        "WF": _fusion,
        "FeatureRefinementHead": _fusion,
        "geoseg/losses": _losses,
        "tools/metric": _metrics,
        "tools/utils.py Lookahead": _lookahead,
        "test-time augmentation": _augmentation,
    }.items():
        if module.startswith(start):
            found = made(old)
            fixed = {"fixed": old.facts["overrides"]} if "overrides" in old.facts else {}
            return fixed | {"recorded": old.facts.get("results", {})} | found
    raise ValueError(f"{old.folder}: {module}")


# --- networks and their parts -----------------------------------------------------------------------------------------


def _part_of(text: str, full: Sequence[int], recorded: Sequence[int]) -> list[Any]:
    """The part of an output of shape `full` that a sentence names and that has the recorded shape.

    "image 0, every 4th channel", "module output, image 0", "[0, ::16] or [0, ::16, ::2, ::2] where larger"."""
    candidates = [[part.strip() for part in found.split(",")] for found in re.findall(r"\[([\d:, ]*:[\d:, ]*)\]", text)]
    if image := re.search(r"image (\d+)", text):
        every = re.search(r"every (\d+)", text)
        candidates.append([image[1], *([f"::{every[1]}"] if every else [])])
    candidates += [[], [0, *(f"::{-(-n // kept)}" for n, kept in zip(full[1:], recorded, strict=False))]]
    for candidate in candidates:
        at = [part if ":" in str(part) else int(part) for part in candidate]
        slices = [slice(*(int(n) if n else None for n in part.split(":"))) for part in at if isinstance(part, str)]
        left = [n for n, part in zip(full, [*at, *[":"] * len(full)], strict=False) if isinstance(part, str)]
        shape = [len(range(n)[s]) for n, s in zip(left, [*slices, *[slice(None)] * len(left)], strict=False)]
        if shape == list(recorded):
            return at
    raise ValueError(f"no part of {list(full)} has the shape {list(recorded)}: {text}")


def _taps(old: Old, of: Mapping[str, tuple[str, Sequence[int]]]) -> dict[str, Any]:
    """The outputs of a case, each a part of ours: name -> (reference, its shape)."""
    return {
        name: tap(of[name][0], *_part_of(old.facts["outputs"].get(name, ""), of[name][1], shape))
        for name, shape in old.shapes.items()
    }


def _loaded(target: str, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
    """The steps that build a part of the decoder as "part" and load the official tensors."""
    return [
        call("part", f"{MODEL}decoder:{target}", *args, **kwargs),
        call("names", f"{MODEL}official:decoder_names", "$part"),
        call("loaded", "models.layers.state_dicts:load_official", "$part", "$state", "$names", "GeoSeg's decoder"),
        call("eval", "$part.eval"),
    ]


def _made(old: Old, part: str, sizes: list[Any], inputs: list[str], steps: list, of: Mapping) -> dict[str, Any]:
    """A part of FT-UNetFormer's decoder by calls, of UNetFormer's by `tests/parity/metasegnet.py`.

    UNetFormer's separable convolution has its BatchNorm in the middle, and the lateral one a kernel of 1."""
    outputs, given = _taps(old, of), {name: old.input(name) for name in inputs}
    middle = [shape for name, shape in old.names.items() if name.endswith("proj.1.weight")]
    lateral = [shape for name, shape in old.names.items() if re.fullmatch(r"(p\d\.)?pre_conv\.0\.weight", name)]
    if any(len(shape) == 1 for shape in middle) or (not middle and lateral[0][-1] == 1):
        at = {name: facts.get("at", []) for name, facts in outputs.items()}
        settings = {"part": part, "sizes": sizes, "inputs": inputs, "at": at}
        if "h" in old.facts["inputs"]:
            settings["size"] = [old.facts["inputs"][side] for side in ("h", "w")]
        return {"code": "unetformer", "inputs": given, "settings": settings}
    return {"inputs": given, "steps": [*_loaded(part, *sizes), *steps], "outputs": outputs}


def _network(old: Old) -> dict[str, Any]:
    """The whole network, its Swin's maps and logits."""
    side = [-(-n // 4) for n in old.shape("image")[2:]]
    images, of = old.shape("image")[0], {}
    for k in range(len(old.config["depths"])):
        of[f"stage{k + 1}"] = (f"$out.1.maps.{k}", [images, old.config["embed_dim"] * 2**k, *side])
        side = [-(-n // 2) for n in side]
    of["logits"] = ("$out.0", [images, old.config["num_classes"], *old.shape("image")[2:]])
    steps = [
        call("model", f"{MODEL}model:MetaSegNet.from_official", "$state"),
        call("out", "$model.forward_intermediates", "$image"),
    ]
    return {"inputs": {"image": old.input("image")}, "steps": steps, "outputs": _taps(old, of)}


def _decoder(old: Old) -> dict[str, Any]:
    config, maps = old.config, ["res1", "res2", "res3", "res4"]
    size, images = [old.facts["inputs"][side] for side in ("h", "w")], old.shape("res1")[0]
    sizes = [
        config["encoder_channels"],
        *(config[k] for k in ("num_classes", "decode_channels", "heads", "window_size")),
    ]
    of = {name: (f"$out.1.x{k}", old.shape(f"res{k}")) for k, name in ((4, "b4"), (3, "b3"), (2, "b2"), (1, "p1"))}
    of = {name: (where, [images, config["decode_channels"], *shape[2:]]) for name, (where, shape) in of.items()}
    of |= {name: ("$out.0", [images, config["num_classes"], *size]) for name in ("logits", "aux_logits")}
    steps = [call("out", "$part", [f"${name}" for name in maps], size)]
    return _made(old, "Decoder", sizes, maps, steps, of)


def _sizes(old: Old) -> list[int]:
    return [old.config[key] for key in ("dim", "num_heads", "window_size")]


def _attention(old: Old) -> dict[str, Any]:
    steps, shape = [call("local", "$part.local", "$x"), call("out", "$part", "$x")], old.shape("x")
    return _made(
        old, "GlobalLocalAttention", _sizes(old), ["x"], steps, {n: (f"${n}", shape) for n in ("local", "out")}
    )


def _block(old: Old) -> dict[str, Any]:
    steps = [
        call("normed", "$part.norm1", "$x"),
        call("attended", "$part.attention", "$normed"),
        call("after_attention", "torch:add", "$x", "$attended"),
        call("out", "$part", "$x"),
    ]
    of = {name: (f"${name}", old.shape("x")) for name in ("after_attention", "out")}
    return _made(old, "Block", _sizes(old), ["x"], steps, of)


def _fusion(old: Old) -> dict[str, Any]:
    part = "WeightedFusion" if old.facts["module"].startswith("WF") else "Refinement"
    width = old.config["decode_channels"]
    of = {"out": ("$out", [old.shape("res")[0], width, *old.shape("res")[2:]])}
    steps = [call("out", "$part", "$x", "$res")]
    return _made(old, part, [old.config["in_channels"], width], ["x", "res"], steps, of)


# --- losses, scores, optimiser, augmentation --------------------------------------------------------------------------


def _losses(old: Old) -> dict[str, Any]:
    """The losses and the gradient of the joint one; an input is a sentence: 2 * values("input:logits", [2, 8])."""
    config = old.config
    ignore, smooth = config["ignore_index"], config["smooth_factor"]
    where, inputs = f"{MODEL}losses:", {"labels": {"stored": "labels", "apply": ["long"]}}
    for name in ("logits", "aux"):
        factor = float(re.findall(r"^([\d.]+) \*", old.facts["inputs"][name])[0])
        inputs[name] = old.input(name, ["mul", factor])
    given = ["$given.0", "$labels", ignore]
    steps = [
        call("given", "torch.nn:ParameterList", ["$logits"]),
        call("soft_ce", f"{where}soft_cross_entropy", *given, smooth),
        call("ce_without_smoothing", f"{where}soft_cross_entropy", *given, 0.0),
        call("dice", f"{where}dice_loss", *given, config["dice_smooth"]),
        call("joint", f"{where}joint_loss", *given),
        call("auxiliary", f"{where}soft_cross_entropy", "$aux", "$labels", ignore, smooth),
        call("unetformer_loss_train", "torch:add", "$joint", "$auxiliary", alpha=config["aux_weight"]),
        {"name": "valid_fraction", "of": "$labels", "apply": [["ne", ignore], "float", "mean"]},
        call("per_labelled", "torch:div", "$soft_ce", "$valid_fraction"),
        {"name": "grad", "backward": "$joint", "of": "$given"},
    ]
    outputs = {name: f"${name}" for name in old.facts["results"] if name in {step["name"] for step in steps}}
    outputs |= {name: "$per_labelled" for name in old.facts["results"] if name.startswith("torch_cross_entropy")}
    outputs |= {name: "$joint" for name in old.facts["results"] if name == "unetformer_loss_eval"}
    full = old.shape("logits")
    at = _part_of(old.facts["outputs"]["grad_joint"], full, old.shapes["grad_joint"])
    return {"inputs": inputs, "steps": steps, "outputs": outputs | {"grad_joint": tap("$grad.0", *at)}}


def _metrics(old: Old) -> dict[str, Any]:
    """The scores of stored labels and predictions, as shares; with and without the last class."""
    classes, where = old.config["num_classes"], "evaluation.metrics.landcover:"
    steps = [
        call("confusion", f"{where}confusion", "$gt", "$pred", classes),
        call("all", f"{where}scores", "$confusion"),
        call("without_last", f"{where}scores", "$confusion", [classes - 1]),
    ]
    taps = {"confusion": "$confusion", "OA": "$all.oa", "iou": "$all.iou", "f1": "$all.f1"}
    for some in ("all", "without_last"):
        taps |= {f"mIoU_{some}": f"${some}.miou", f"mF1_{some}": f"${some}.mf1"}
    share = (["__truediv__", 100],)
    outputs = {name: tap(of, apply=() if name == "confusion" else share) for name, of in taps.items()}
    return {"inputs": {name: {"stored": name} for name in ("gt", "pred")}, "steps": steps, "outputs": outputs}


def _lookahead(old: Old) -> dict[str, Any]:
    """A training of two vectors, by `tests/parity/metasegnet.py`."""
    keys = ("k", "alpha", "groups", "steps")
    inputs = {group["name"]: old.input(group["name"]) for group in old.config["groups"]}
    return {"code": "lookahead", "inputs": inputs, "settings": {key: old.config[key] for key in keys}}


def _augmentation(old: Old) -> dict[str, Any]:
    """Views of an image through a small network, which config describes: "Sequential(Conv2d(3,5,5,padding=2), ...)"."""
    layers = re.findall(r"(\w+)(?:\(([\d,= a-z]*)\))?(?:, |\)$)", old.config["model"].removeprefix("Sequential("))
    steps, names = [], []
    for i, (kind, given) in enumerate(layers):
        words = [word.strip() for word in given.split(",") if word]
        numbers_ = [int(word) for word in words if "=" not in word]
        options = {key: int(value) for key, value in (word.split("=") for word in words if "=" in word)}
        steps.append(call(f"layer{i}", f"torch.nn:{kind}", *numbers_, **options))
        names.append(f"$layer{i}")
    steps += [call("network", "torch.nn:Sequential", *names), call("loaded", "$network.load_state_dict", "$state")]
    kinds = {"plain": "none", "lr": "lr", "d4_potsdam": "d4", "d4_loveda": "d4 loveda"}
    steps += [call(name, f"{MODEL}inference:augmented", "$network", "$image", kinds[name]) for name in old.shapes]
    image = old.shape("image")
    classes = int(re.findall(r"Conv2d\(\d+,\s*(\d+)", old.config["model"])[-1])
    outputs = _taps(old, {name: (f"${name}", [image[0], classes, *image[2:]]) for name in old.shapes})
    return {"inputs": {"image": old.input("image")}, "steps": steps, "outputs": outputs}


# --- recipes ----------------------------------------------------------------------------------------------------------

COLOURS = {"white": (255, 255, 255), "blue": (0, 0, 255), "cyan": (0, 255, 255), "green": (0, 255, 0)}
COLOURS |= {"yellow": (255, 255, 0), "red": (255, 0, 0), "black": (0, 0, 0), "orange": (255, 165, 0)}
COLOURS |= {"grey": (128, 128, 128), "magenta": (255, 0, 255)}
NAMES = {"ImSurf": "impervious", "LowVeg": "low vegetation", "agricultural": "agriculture"}
HEADS, AUXILIARY = 16, 0.4  # of FT-UNetFormer's decoder; weight of UNetFormer's auxiliary loss: no case records them


def recipe(facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe case with numbers in its settings where sentences were."""
    for start, made in {
        "groups": _groups,
        "labels": _labels,
        "loss": lambda facts: {"auxiliary": AUXILIARY},
        "metric": _metric,
        "preprocess_tiles": _tiles,
        "preprocess_training": _training,
        "preprocess_views": _views,
        "schedule": lambda facts: {"dataset": _dataset(facts["case"].split("_")[1])},
        "selection": _selection,
        "trajectory": _trajectory,
    }.items():
        if folder.name.startswith(start):
            return facts | {"settings": facts["settings"] | made(facts)}
    return facts


def _dataset(text: str) -> str:
    """Our name of the data set that a text begins with."""
    return f"landcover/{re.findall(r'[a-z]+', text)[0]}"


def _groups(facts: dict[str, Any]) -> dict[str, Any]:
    datasets = {name: _dataset(name) for name in facts["expected"]["groups"]}
    return {"classes": int(re.findall(r"(\d+) classes", facts["settings"]["model"])[0]), "datasets": datasets}


def _labels(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "datasets": {name: _dataset(name) for name in facts["expected"]},
        "names": {name: NAMES.get(name, name.lower()) for e in facts["expected"].values() for name in e["classes"]},
        "colours": COLOURS,
    }


def _metric(facts: dict[str, Any]) -> dict[str, Any]:
    return {"absent": {key: int(m[1]) for key in facts["expected"] if (m := re.match(r"class (\d+) predicted", key))}}


def _tiles(facts: dict[str, Any]) -> dict[str, Any]:
    """The areas of the mask, each over those before: "green; rows 0..19 of columns 0..29 blue; rows 30..32 black"."""
    width, height = facts["settings"]["picture_width_height"]
    flips = {"as it is": "", "mirrored left-right": "left-right", "mirrored top-down": "upside down"}
    first, *areas = facts["settings"]["mask"].split("; ")
    mask = [{"rows": [0, height - 1], "columns": [0, width - 1], "colour": COLOURS[first]}]
    for area in areas:
        match = re.fullmatch(r"rows (\d+)\.\.(\d+)(?: of columns (\d+)\.\.(\d+))? (\w+)", area)
        if not match:
            raise ValueError(area)
        top, bottom, left, right = (int(n) if n else None for n in match.groups()[:4])
        columns = [0, width - 1] if left is None else [left, right]
        mask.append({"rows": [top, bottom], "columns": columns, "colour": COLOURS[match[5]]})
    of = {what: what.split(": ") for what in facts["expected"]}
    kinds = {what: ["train" if split == "train" else "test", flips[kind]] for what, (split, kind) in of.items()}
    return {"mask": mask, "kinds": kinds}


def _training(facts: dict[str, Any]) -> dict[str, Any]:
    """Random operations by name, of a recipe or of another network's; the labels of "shares_of_label_0_1_6"."""
    e, operations = facts["expected"], {}
    for key, lines in e.items():
        if isinstance(lines, list) and isinstance(lines[0], str):
            operations[key] = {"dataset": _dataset(key)} | {k: v for line in lines for k, v in _operation(line).items()}
            operations[key]["own"] = "config's own" not in key
    crops = []
    for one in e["smart_crop"]:
        key = next(key for key in one if key.startswith("shares_of_label_"))
        labels = [int(n) for n in key.removeprefix("shares_of_label_").split("_")]
        tried = {int(name.rpartition("_")[2]): count for name, count in one.items() if name.startswith("crops_tried")}
        crops.append({"name": one["name"], "labels": labels, "shares": one[key], "tried": list(tried.items())})
    levels = next(key for key in e if key.startswith("brightness_contrast_of_"))
    return {
        "operations": operations,
        "smart_crop": crops,
        "levels": {levels: [int(n) for n in levels.removeprefix("brightness_contrast_of_").split("_")]},
    }


def _operation(line: str) -> dict[str, Any]:
    """The numbers of one random operation: "RandomScale one of 0.75, 1", "SmartCropV1 768, max_ratio 0.75, ..."."""
    values = [float(n) for n in re.findall(r"(?<![A-Za-z\d])\d+(?:\.\d+)?", line)]
    name = line.split()[0]
    if name == "mosaic":
        return {"mosaic": values[0]}
    if name == "RandomScale":
        return {"scales": values} if values else {}
    if name == "SmartCropV1":
        most = {"most": values[1]} if "max_ratio" in line else {}
        return {"crop": int(values[0]), "ignored": int(re.findall(r"ignored (\d+)", line)[0])} | most
    if name == "HorizontalFlip":
        return {"flip": values[0]}
    if name == "VerticalFlip":
        return {"upside_down": values[0]}
    if name == "RandomBrightnessContrast":
        return {"brightness": values[:2], "light": values[2]}
    if name == "Normalize" or line.startswith("no flip"):
        return {}
    raise ValueError(line)


def _views(facts: dict[str, Any]) -> dict[str, Any]:
    kinds = {what: "lr" if what.startswith("lr") else what.partition(" ")[2] for what in facts["expected"]}
    return {"kinds": {what: f"{kind} loveda" if "loveda" in what else kind for what, kind in kinds.items()}}


def _selection(facts: dict[str, Any]) -> dict[str, Any]:
    tested = {}
    for config, kind in facts["expected"]["tested_checkpoint"].items():
        dataset, network = config.removesuffix(".py").split("/")[1:]
        score = {"val_F1": "mf1", "val_mIoU": "miou"}.get(kind.rpartition(" ")[2])
        tested[config] = {"dataset": _dataset(dataset), "network": network, "epoch": kind.split()[0], "score": score}
    folders = {name: text.partition(":")[0] for name, text in facts["expected"]["validated_on"].items()}
    splits = {name: {"dataset": _dataset(name), "split": path.split("/")[-1].lower()} for name, path in folders.items()}
    return {"tested": tested, "validated_on": splits}


def _trajectory(facts: dict[str, Any]) -> dict[str, Any]:
    s = facts["settings"]
    encoder, decoder = (int(n) for n in re.findall(r"\d+", s["model"]["window_size"]))
    labels = re.findall(r"integers\(0, (\d+), (\([\d, ]+\))\), each repeated (\d+)", s["step_i"]["labels"])[0]
    tolerance = {name: dict([text.split()]) for name, text in facts["tolerance"].items()}
    return {
        "windows": {"encoder": encoder, "decoder": decoder},
        "heads": HEADS,
        "images": numbers(s["step_i"]["image"]),
        "labels": {"below": int(labels[0]), "shape": numbers(labels[1]), "repeated": int(labels[2])},
        "tolerance": {name: {kind: float(n) for kind, n in one.items()} for name, one in tolerance.items()},
    }
