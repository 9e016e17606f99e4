"""ECAMP's cases of version 2, recorded from ToniChopp/ECAMP at d02d16d."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from companion.models.ecamp import official
from companion.models.ecamp.model import ECAMP, MASKED, Bert, Fusion
from companion.models.ecamp.recipe import TITLES
from companion.models.layers.state_dicts import renamed

from . import Old, call, numbers, tap

MODEL, HEADS, DETECTION = "models.ecamp.model:", "models.ecamp.heads:", "models.ecamp.detection:"
MAE, DICE = "models.layers.mae:", "evaluation.metrics.radiology:dice"


def parity(old: Old) -> dict[str, Any]:
    """The calls and taps of any case, by the beginning of its name."""
    for start, made in {
        "model": _model,
        "fusion": _fusion,
        "image_losses": _images,
        "position": _positions,
        "attention_map": _attention,
        "text_masking": _texts,
        "classifier": _classifier,
        "segmenter": _segmenter,
        "detector": _detector,
        "small_losses": _losses,
    }.items():
        if old.name.startswith(start):
            return made(old)
    raise ValueError(f"{old.folder}: no kind of case begins so")


def _stored(old: Old) -> dict[str, Any]:
    """The inputs in the file, without the "in." before their names."""
    return {name.removeprefix("in."): {"stored": name} for name in old.shapes if name.startswith("in.")}


def _taps(old: Old, whole: dict[str, Any]) -> dict[str, Any]:
    """Where each recorded output is read: of `whole`, by its name before a part such as "[:,::16,::4]"."""
    found = {}
    for name in (name for name in old.shapes if not name.startswith("in.")):
        base, _, part = name.partition("[")
        of = whole[base] if isinstance(whole[base], dict) else {"of": whole[base]}
        at = [*of.get("at", []), *(part.rstrip("]").split(",") if part else [])]
        found[name] = tap(of["of"], *at, apply=tuple(of.get("apply", ())))
    return found


def _heads(old: Old, *names: str) -> int | None:
    """The attention heads under the first of `names` in the configuration; None: one for 64 channels."""
    return next((old.config[name] for name in (*names, "num_attention_heads", "num_heads") if name in old.config), None)


def _corners(old: Old) -> dict[str, Any]:
    said = old.facts["inputs"]
    return {"value": [list(corner) for corner in zip(said["column"], said["row"], strict=True)]}


# --- pre-training -----------------------------------------------------------------------------------------------------


def _model(old: Old) -> dict[str, Any]:
    config, bert = old.config, old.config["bert"]
    heads = {"heads": config["heads"], "decoder_heads": config["decoder_heads"]}
    heads |= {"text_heads": bert.get("heads") or bert["num_attention_heads"], "window": config.get("window", 12)}
    parts = ("image", "ids", "labels", "attention_mask", "weights", "mask_noise", "corners")
    given = {"image": old.input("image"), "mask_noise": old.input("mask_noise"), "corners": _corners(old)}
    losses = {"loss.mim": "mim", "loss.res": "sr", "loss.mlm": "mlm", "loss.total": "total"}
    whole = {
        "image224": "low",
        "ids_keep": "keep",
        "latent": "latent",
        "pred": "pixels",
        "super_res": "super_resolved",
        "text_embeddings": "embedded",
        "fusion": "fused",
        "logits": "logits",
    }
    return {
        "inputs": given | _stored(old),
        "steps": [
            call("model", f"{MODEL}ECAMP.from_official", "$state", **heads),
            call("batch", f"{MODEL}Batch", *(f"${part}" for part in parts)),
            call("run", "$model.forward_intermediates", "$batch"),
            {"name": "classes", "of": "$run.1.logits", "apply": [["transpose", 1, 2]]},
            call("each", "torch.nn.functional:cross_entropy", "$classes", "$labels", reduction="none"),
        ],
        "outputs": _taps(
            old,
            {name: f"$run.1.{ours}" for name, ours in whole.items()}
            | {name: f"$run.0.{ours}" for name, ours in losses.items()}
            | {"mlm_per_token": "$each"},
        ),
    }


def _fusion(old: Old) -> dict[str, Any]:
    """The fusion layer alone: its tensors have the names that follow `context_fusion_layer.` in the whole model."""
    config, start = old.config, f"{official.BERT}context_fusion_layer."
    sizes = {"width": config["hidden_size"], "heads": config["num_attention_heads"]}
    sizes |= {"hidden": config["intermediate_size"], "dropout": 0.0}
    names = renamed([f"text.fusion.{name}" for name in Fusion(Bert(**sizes)).state_dict()], ECAMP.rules)
    names = {ours.removeprefix("text.fusion."): theirs.removeprefix(start) for ours, theirs in names.items()}
    part = [":", f"::{config['stride_text']}", f"::{config['stride_channel']}"]
    terms = {"self_attention": "attended", "cross_context": "fine", "after_mix": "mixed"}
    whole: dict[str, Any] = {name: {"of": f"$run.1.{ours}", "at": part} for name, ours in terms.items()}
    whole |= {"output": {"of": "$run.0", "at": part}, "global_term": "$run.1.coarse"}
    whole["cross_probabilities"] = {"of": "$map", "at": [":", ":", part[1]]}
    return {
        "inputs": {"hidden": old.input("hidden"), "latent": old.input("latent")} | _stored(old),
        "steps": [
            call("sizes", f"{MODEL}Bert", **sizes),
            call("layer", f"{MODEL}Fusion", "$sizes"),
            call("loaded", "models.layers.state_dicts:load_official", "$layer", "$state", names, "the fusion layer"),
            {"name": "mask", "of": "$attention_mask", "apply": ["bool", ["unsqueeze", 1], ["unsqueeze", 1]]},
            call("run", "$layer", "$hidden", "$mask", "$latent"),
            call("map", "$layer.cross.attention_map", "$run.1.attended", "$latent"),
        ],
        "outputs": _taps(old, whole),
    }


def _images(old: Old) -> dict[str, Any]:
    patch, side = old.config["patch"], old.shape("image")[-1]
    names = {f"{conv}.{kind}": f"super_res.{conv}.{kind}" for conv in ("conv1", "conv2") for kind in ("weight", "bias")}
    patches, pixels = old.shape("pred")[1:]
    spread = [["unsqueeze", -1], ["expand", -1, -1, pixels]]
    given = {name: old.input(name) for name in ("small", "image", "pred", "mask_noise")}
    return {
        "inputs": given | {"corners": _corners(old)},
        "steps": [
            call("block", f"{MODEL}SuperResolution"),
            call("loaded", "models.layers.state_dicts:load_official", "$block", "$state", names, "super-resolution"),
            call("small_out", "$block", "$small"),
            call("low", f"{MODEL}shrink", "$image"),
            call("target", f"{MAE}patchify", "$low", patch),
            call("mask", f"{MAE}random_mask", "$mask_noise", int(patches * (1 - MASKED))),
            {"name": "spread", "of": "$mask.1", "apply": spread},
            call("pixels", f"{MAE}unpatchify", "$spread", patch),
            call("whole", f"{MAE}unpatchify", "$pred", patch),
            call("resolved", "$block", "$whole"),
            call("window", f"{MODEL}windows", "$corners", old.config["window"], 2 * patch, side),
            call("mim", f"{MODEL}mim_loss", "$pred", "$target", "$mask.1"),
            call("sr", f"{MODEL}sr_loss", "$resolved", "$image", "$window"),
        ],
        "outputs": _taps(
            old,
            {
                "small_out": "$small_out",
                "unpatchified": "$whole",
                "sr_of_pred": "$resolved",
                "token_mask": "$mask.1",
                "pixel_mask_rowsum": {"of": "$pixels", "at": [":", 0], "apply": [["sum", -1]]},
                "window_mask_rowsum": {"of": "$window", "at": [":", 0], "apply": [["sum", -1]]},
                "window_mask_colsum": {"of": "$window", "at": [":", 0], "apply": [["sum", -2]]},
                "loss.mim": "$mim",
                "loss.res": "$sr",
                "share_of_negative_targets": {"of": "$image", "apply": [["lt", 0], "float", "mean"]},
            },
        ),
    }


def _positions(old: Old) -> dict[str, Any]:
    """A table for each output, named "<kind>_<width>_<side>"."""
    steps, whole = [], {}
    for base in dict.fromkeys(name.partition("[")[0] for name in old.shapes):
        kind, width, side = base.split("_")
        steps.append(call(base, "models.layers.pos_embed:sincos_table", int(width), int(side), kind))
        whole[base] = {"of": f"${base}", "at": [0]}
    return {"steps": steps, "outputs": _taps(old, whole)}


def _attention(old: Old) -> dict[str, Any]:
    heads = {"heads": old.config.get("vit_heads"), "decoder_heads": old.config.get("decoder_heads", 16)}
    heads["text_heads"] = old.config["heads"]
    side = old.shape("image")[-1]
    return {
        "inputs": {"image": old.input("image"), "mask_noise": old.input("mask_noise")} | _stored(old),
        "steps": [
            call("model", f"{MODEL}ECAMP.from_official", "$state", **heads, window=None),
            call("maps", "$model.attention", "$image", "$ids", "$attention_mask"),
            {"name": "raster", "of": "$maps", "at": [0, ":", old.config["token_index"]]},
            {"name": "order", "of": "$mask_noise", "at": [0], "apply": ["argsort"]},
            # the encoder does not depend on the order of the patches
            call("shuffled", "torch:index_select", "$raster", 1, "$order"),
            call("heat_as_in_code", f"{MODEL}heat", "$shuffled"),
            call("heat_raster", f"{MODEL}heat", "$raster"),
            call("heat_raster_up", f"{MODEL}heat", "$raster", side),
        ],
        "outputs": _taps(
            old,
            {name: f"${name}" for name in ("heat_as_in_code", "heat_raster", "heat_raster_up")}
            | {"attention_shuffled": "$shuffled", "attention_raster": "$raster"}
            | {"ids_restore": {"of": "$order", "apply": ["argsort"]}},
        ),
    }


def _texts(old: Old) -> dict[str, Any]:
    """Recorded draws are replayed, one after the other: code."""
    settings = {"vocabulary": old.facts["inputs"]["vocabulary"], "length": old.config["length"]}
    settings |= {name: old.facts[name] for name in ("examples", "insertion_examples") if name in old.facts}
    return {"code": "texts", "settings": settings}


# --- downstream -------------------------------------------------------------------------------------------------------


def _classifier(old: Old) -> dict[str, Any]:
    blocks = {name.partition("[")[0] for name in old.shapes if name.startswith("block")}
    return {
        "inputs": {"image": old.input("image")},
        "steps": [
            call("model", f"{HEADS}classifier_from_official", "$state", _heads(old, "heads")),
            *({"name": name, "watch": f"$model.blocks.{name.removeprefix('block')}"} for name in sorted(blocks)),
            call("x", "$model.forward_features", "$image"),
            call("features", "$model.forward_head", "$x", pre_logits=True),
            call("logits", "$model.forward_head", "$x"),
        ],
        "outputs": _taps(old, {name: f"${name}.0" for name in blocks} | {"features": "$features", "logits": "$logits"}),
    }


def _segmenter(old: Old) -> dict[str, Any]:
    """One decoder, with any number of classes, whose loss is over all of them at once; or RIGA's two."""
    riga = ("decoder_disc", "decoder_cup")
    names = riga if any(name.startswith(riga[1]) for name in old.names) else ("decoder",)
    steps = len({name.split(".")[1] for name in old.names if name.startswith(f"{names[0]}.decoder_")})
    (images, *_, side), mask = old.shape("image"), old.shape("mask")
    classes = old.names[f"{names[0]}.final_out.bias"][0]
    outputs = len(names) * classes
    binary: list[Any] = [["gt", 1], "float"]
    if math.prod(mask) != images * outputs * side * side:
        binary += [["unsqueeze", 1], ["expand", images, outputs, side, side]]
    flat = ["reshape", images, len(names), -1]  # a decoder's logits and mask as one map, whatever its classes
    watched = [f"{name}.decoder_{i + 1}" for name in names for i in range(steps)]
    return {
        "inputs": {"image": old.input("image"), "mask": old.input("mask", *binary, flat)},
        "steps": [
            call("model", f"{HEADS}Segmenter.from_official", "$state", _heads(old, "heads")),
            *({"name": f"step{i}", "watch": f"$model.decoders.{name}"} for i, name in enumerate(watched)),
            call("map", "$model.map", "$image"),
            *(call(name, f"$model.decoders.{name}", "$map") for name in names),
            call("logits", "torch:cat", [f"${name}" for name in names], 1),
            {"name": "flat", "of": "$logits", "apply": [flat]},
            {"name": "probability", "of": "$flat", "apply": ["sigmoid"]},
            call("mixed", f"{HEADS}segmentation_loss", "$flat", "$mask"),
            call("focal", f"{HEADS}focal_loss", "$flat", "$mask"),
            call("soft_dice", f"{HEADS}soft_dice", "$flat", "$mask"),
            call("dice", DICE, "$probability", "$mask"),
        ],
        "outputs": _taps(
            old,
            {f"decoder_{i}": f"$step{i - 1}.0" for i in range(1, len(watched) + 1)}
            | {name.replace("decoder", "logits"): f"${name}" for name in names if name != "decoder"}
            | {"encoder_map": "$map", "logits": "$logits", "loss.mixed": "$mixed", "loss.focal": "$focal"}
            | {"dice_coefficient": "$soft_dice", "metric.dice": "$dice"},
        ),
    }


def _detector(old: Old) -> dict[str, Any]:
    images, grid = old.shape("image")[0], math.isqrt(old.names["backbone.encoder.pos_embed"][1] - 1)
    sides = [-(-grid // 2), grid, 2 * grid]
    of_head = ("$targets", "$anchors", "$model.size")
    return {
        "inputs": {"image": old.input("image")} | _stored(old),
        "steps": [
            call("model", f"{DETECTION}Detector.from_official", "$state", _heads(old, "heads")),
            call("anchors", f"{DETECTION}anchors", "$model.size"),
            call("map", "$model.map", "$image"),
            call("levels", "$model.pyramid", "$map"),
            call("heads", "$model", "$image"),
            *(step for i in range(3) for step in _head(i, *of_head)),
            call("losses", "torch:stack", [f"$losses{i}" for i in range(3)]),
            call("decoded", "torch:cat", [f"$decoded{i}" for i in range(3)], 1),
            call("kept", f"{DETECTION}suppress", "$decoded"),
            *({"name": f"count{i}", "of": f"$kept.{i}", "apply": ["__len__"]} for i in range(images)),
            call("counts", "torch:tensor", [f"$count{i}" for i in range(images)]),
        ],
        "outputs": _taps(
            old,
            {f"pyramid{side}": f"$levels.{i}" for i, side in enumerate(sides)}
            | {f"head{side}": f"$heads.{i}" for i, side in enumerate(sides)}
            | {"encoder_map": "$map", "losses": "$losses", "decoded": "$decoded", "nms_counts": "$counts"},
        ),
    }


def _head(i: int, boxes: str, anchors: str, size: str | int) -> list[dict[str, Any]]:
    """The losses and the boxes of head i of a detector."""
    return [
        call(f"parts{i}", f"{DETECTION}yolo_loss", f"$heads.{i}", boxes, f"{anchors}.{i}", size),
        call(f"losses{i}", "torch:stack", f"$parts{i}"),
        call(f"decoded{i}", f"{DETECTION}yolo_decode", f"$heads.{i}", f"{anchors}.{i}", size),
    ]


def _losses(old: Old) -> dict[str, Any]:
    config, given = old.config, _stored(old)
    channel = {"apply": [["unsqueeze", 1]]}
    given |= {"logits": given["seg_logits"] | channel, "mask": given["seg_mask"] | channel}
    given |= {
        "heads": given["yolo_head"] | {"apply": [["unsqueeze", 0]]},
        "anchors": {"value": [config["yolo_anchors_px"]]},
    }
    healthy = [["flatten", 1], ["sum", 1], ["eq", 0], "int"]
    return {
        "inputs": given,
        "steps": [
            call("mixed", f"{HEADS}segmentation_loss", "$logits", "$mask"),
            call("focal", f"{HEADS}focal_loss", "$seg_logits", "$seg_mask"),
            call("soft_dice", f"{HEADS}soft_dice", "$seg_logits", "$seg_mask"),
            call("dice", DICE, "$dice_probability", "$seg_mask"),
            {"name": "healthy", "of": "$seg_mask", "apply": healthy},
            call("order", "torch:argsort", "$healthy", stable=True),  # healthy images are recorded last
            call("dice_per_image", "torch:index_select", "$dice", 0, "$order"),
            call("mlm", f"{MODEL}mlm_loss", "$mlm_logits", "$mlm_labels", "$mlm_weights"),
            *_head(0, "$yolo_targets", "$anchors", config["image"]),
            call("kept", f"{DETECTION}suppress", "$nms_predictions", config["confidence"], config["nms_iou"]),
        ],
        "outputs": _taps(
            old,
            {name: f"${name}" for name in ("mixed", "focal", "soft_dice", "dice_per_image")}
            | {"mlm_loss": "$mlm", "yolo_losses": "$losses0", "yolo_decoded": "$decoded0", "nms_output": "$kept.0"},
        ),
    }


# --- recipe cases -----------------------------------------------------------------------------------------------------

TASKS = {"fine-tuning": "fine-tune", "linear probe": "linear probe", "segmentation": "segment", "detection": "detect"}
TASKS |= {"classification": "fine-tune"}
SETTINGS = {"batch_per_gpu": "batch_per_gpu", "gpus": "gpus", "accumulation": "accumulate", "stop_epoch": "epochs"}
SETTINGS |= {"lr": "lr", "warmup_epochs": "warmup_epochs", "cosine_end_epoch": "cosine_ends_at_epoch"}


def recipe(facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe case with numbers and our names of tasks, data sets and settings in place of sentences."""
    tolerance = {name: _room(value) if isinstance(value, str) else value for name, value in facts["tolerance"].items()}
    converted = facts | {"tolerance": tolerance}
    for start, convert in {
        "groups_downstream": _groups,
        "labels_orders": _orders,
        "labels_text": _text_rules,
        "loss": _empty,
        "metric": _metric,
        "preprocess_pretraining": _pretraining_images,
        "preprocess_segmentation": _segmentation_images,
        "schedule_downstream": _schedules,
        "schedule_last_batch": _last_batch,
        "schedule_pretraining": _pretraining_schedule,
        "selection": _sequences,
        "trajectory_pretraining": _pretraining_trajectory,
        "trajectory": _trajectory,
    }.items():
        if folder.name.startswith(start):
            settings, expected = convert(facts["settings"], facts["expected"])
            return converted | {"settings": settings, "expected": expected}
    return converted


def _room(text: str) -> dict[str, float]:
    """A tolerance such as "relative 1e-3" or "exact"."""
    kind, _, value = text.partition(" ")
    return {kind: float(value)} if value else {}


def _floats(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", text)]


def _dataset(title: str) -> str:
    """Our name of a set by the authors' name of its folder: "ODIR5K", "Aptos"."""
    plain = {name: re.sub(r"\W", "", own).lower() for name, own in TITLES.items() if name != "xrays/chestmnist"}
    return next(name for name, own in plain.items() if own.startswith(re.sub(r"\W", "", title).lower()))


Facts = dict[str, Any]


def _groups(settings: Facts, expected: Facts) -> tuple[Facts, Facts]:
    read: dict[str, Callable[[str], Any]] = {
        "decays": lambda text: text.startswith("every"),
        "frozen": lambda text: dict(zip(("within", "but"), re.findall(r"(\S+)\*", text), strict=True)),
        "head_weight": lambda text: _floats(text)[0],
        "pos_embed": lambda text: text == "trained",
        "mode_of_the_encoder": lambda text: _floats(text)[0],  # of drop path in training
    }
    parts = {
        title: {
            key: read[key](value) if key in read and isinstance(value, str) else value for key, value in part.items()
        }
        for title, part in expected.items()
    }
    return settings | {"tasks": {title: TASKS[title] for title in expected}}, parts


def _orders(settings: Facts, expected: Facts) -> tuple[Facts, Facts]:
    """Lists of classes; a sentence on the sets that are scored by accuracy; counts of list files."""
    classes = {title: _dataset(title) for title, value in expected.items() if isinstance(value, list)}
    accuracy, files = {}, {}
    for title, value in expected.items():
        if isinstance(value, str):
            named = [name for name, own in TITLES.items() if own.split("-")[0].lower() in f"{title} {value}".lower()]
            accuracy[title] = named
    for file, count in expected.get("list_files", {}).items():
        title, key = file.split("/")[0], re.sub(r"train_list_?|_list", "", Path(file).stem) or "100"
        files[file] = {"set": title, "dataset": _dataset(title), "key": key}
        positives = count.get("positives_of_each_column", list(count.get("of_each_value", {}).values()))
        files[file] |= {"column": f"train_{key}" if key in ("1", "10") else key, "positives": positives}
    return settings | {"classes": classes, "accuracy": accuracy, "files": files}, expected


def _text_rules(settings: Facts, expected: Facts) -> tuple[Facts, Facts]:
    start, draws = "masked positions: ", {"everything that may be masked": 0.0, "nothing masked": 0.999}
    keys = {key for one in expected["sentences"] for key in one if key.startswith(start)}
    draws = {key: draws.get(key.removeprefix(start), (_floats(key) or [0.0])[-1]) for key in sorted(keys)}
    mask, stop = map(int, re.findall(r"is (\d+)", settings["tokenizer"]))
    statement = (re.findall(r"'(.*)'", settings.get("draws", "")) or [""])[0]
    return settings | {"mask": mask, "stop": stop, "statement": statement, "draws": draws}, expected


def _empty(settings: Facts, expected: Facts) -> tuple[Facts, Facts]:
    said = re.sub(
        "one|two|three|four", lambda m: str(1 + ["one", "two", "three", "four"].index(m[0])), settings["empty"]
    )
    images, height, width, logit = _floats(said)
    return settings | {"empty": {"shape": [int(images), 1, int(height), int(width)], "logit": logit}}, expected


def _metric(settings: Facts, expected: Facts) -> tuple[Facts, Facts]:
    batches = dict(part.split(maxsplit=1) for part in settings["batches"].split("; "))
    sizes = {kind: [int(number) for number in _floats(text)] for kind, text in batches.items()}
    name = next(name for name in expected if name.startswith("map"))
    return settings | {"batches": sizes, "map": name, "ious": _floats(name.replace("_", " "))}, expected


def _pretraining_images(settings: Facts, expected: Facts) -> tuple[Facts, Facts]:
    shares = _floats(re.findall(r"probability (0\.\d+)", expected["text"]["added_statement"])[0])
    text = expected["text"] | {"added_statement": shares[0]}
    return settings, expected | {"text": text, "then_in_the_model": "bicubic" in expected["then_in_the_model"]}


def _segmentation_images(settings: Facts, expected: Facts) -> tuple[Facts, Facts]:
    rows = re.findall(r"rows (\d+)\.\.(\d+) of columns (\d+)\.\.(\d+)", settings["mask_siim"])
    boxes = [[int(top), int(bottom) + 1, int(left), int(right) + 1] for top, bottom, left, right in rows]
    *ranges, share = _floats(settings["training"][0])
    return settings | {"boxes_siim": boxes, "warp": {"ranges": ranges, "p": share}}, expected


def _schedules(settings: Facts, expected: Facts) -> tuple[Facts, Facts]:
    tasks = {title: TASKS[title] for title in expected}
    names = {one["task"]: _dataset(one["task"]) for scripts in expected.values() for one in scripts}
    return settings | {"tasks": tasks, "datasets": names}, expected


def _last_batch(settings: Facts, expected: Facts) -> tuple[Facts, Facts]:
    runs = [one | {"task": TASKS[one["task"]]} for one in expected["fine_tuning"]]
    return settings, expected | {"fine_tuning": runs, "pre_training": "dropped" in expected["pre_training"]}


def _pretraining_settings(facts: Facts) -> dict[str, float]:
    return {ours: facts[theirs] for ours, theirs in SETTINGS.items() if theirs in facts}


def _pretraining_schedule(settings: Facts, expected: Facts) -> tuple[Facts, Facts]:
    return settings | {"published": _pretraining_settings(settings)}, expected


def _sequences(settings: Facts, expected: Facts) -> tuple[Facts, Facts]:
    runs = {name: one | {"task": TASKS[one["task"]]} for name, one in settings["sequences"].items()}
    return settings | {"sequences": runs}, expected


def _pretraining_trajectory(settings: Facts, expected: Facts) -> tuple[Facts, Facts]:
    optimiser = settings["optimiser"]
    values = _pretraining_settings(settings["schedule"] | settings)
    values |= {"lr": optimiser["lr"], "beta1": optimiser["betas"][0], "beta2": optimiser["betas"][1]}
    values["weight_decay"] = _floats(str(optimiser["weight_decay"]))[0]
    names = {"masked image": "mim", "super-resolution": "sr", "text": "mlm"}
    return settings | {"published": values, "losses": [names[name] for name in expected["losses_are"]]}, expected


def _trajectory(settings: Facts, expected: Facts) -> tuple[Facts, Facts]:
    """The sizes of a model under either spelling, the shape of the images."""
    model = settings["model"]
    spellings = {"img_size": ("img_size",), "patch_size": ("patch_size",), "embed_dim": ("hidden_size", "embed_dim")}
    spellings |= {"depth": ("num_hidden_layers", "depth"), "num_heads": ("num_attention_heads", "num_heads")}
    sizes = {ours: next(model[name] for name in names if name in model) for ours, names in spellings.items()}
    shape = numbers(settings["images"])
    return settings | {"vit": sizes | {"mlp_ratio": model.get("mlp_ratio", 4)}, "shape": shape}, expected
