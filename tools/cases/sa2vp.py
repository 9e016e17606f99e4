"""SA²VP's cases of version 2, recorded from tommy-xq/SA2VP at 35674e7."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from . import Old, call, numbers, tap
from .sentences import drawn, number, seed, step

MODEL = "models.sa2vp.model:"

# the authors' names of data sets, where they are not ours
NAMES = {
    "oxford flowers": "fgvc/flowers102", "stanford dogs": "fgvc/dogs120", "stanford cars": "fgvc/cars196",
    "CUB": "fgvc/cub200", "DOG": "fgvc/dogs120", "FLOWER": "fgvc/flowers102", "CAR": "fgvc/cars196",
    "BIRD": "fgvc/nabirds", "CAL101": "vtab/caltech101", "CIFAR": "vtab/cifar100", "FLOWER_S": "vtab/flowers102",
    "PET": "vtab/pets", "SVHN_S": "vtab/svhn", "SUN": "vtab/sun397", "DS_LOC": "vtab/dsprites_location",
    "DS_ORI": "vtab/dsprites_orientation", "SN_AZI": "vtab/smallnorb_azimuth", "SN_ELE": "vtab/smallnorb_elevation",
    "ds/ori (dsprites orientation)": "vtab/dsprites_orientation",
    "sn/ele (smallnorb elevation)": "vtab/smallnorb_elevation", "oxford flowers (FGVC)": "fgvc/flowers102",
}  # fmt: skip
GROUPS = {"vtab natural": ["vtab/cifar100"], "vtab specialized": ["vtab/eurosat"], "vtab structured": ["vtab/dmlab"]}
GROUPS |= {"hta": ["hta/dtd", "hta/cub200"]}
FGVC = ("cub200", "nabirds")  # our names too


def _dataset(name: str, group: str = "vtab") -> str:
    """Our name of a data set: "vtab dtd", "hta svhn", "cub200", "DTD"."""
    if name in NAMES or name.replace("_", " ") in NAMES:
        return NAMES.get(name) or NAMES[name.replace("_", " ")]
    first, _, rest = name.partition(" ")
    if first in ("vtab", "hta"):
        known = NAMES.get(rest, rest).rpartition("/")[2]
        return f"{first}/{known.replace(' ', '_').lower()}"
    return f"{'fgvc' if name in FGVC else group}/{name.replace(' ', '_').lower()}"


def recipe(facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe case with our names of data sets, and numbers and steps in place of sentences."""
    kind, settings, expected = folder.name.partition("_")[0], facts["settings"], facts["expected"]
    if kind == "groups":
        settings |= {"data_set": _dataset(settings["data_set"]), "swin": settings["backbone"].startswith("Swin")}
    elif kind == "labels":
        settings["classes"] = {name: _dataset(name) for name in expected["classes"]}
        settings["fgvc"] = {name: _dataset(name, "fgvc") for name in expected["fgvc_index"]}
    elif folder.name.startswith("preprocess_train"):
        for name in ("vtab", "fgvc"):
            expected[name] = [step(text) for text in expected[name]]
    elif kind == "settings":
        exceptions = expected["vit_b16"].pop("exceptions", {})
        sets = {name: GROUPS.get(name) or [_dataset(name, "fgvc")] for name in expected["vit_b16"]}
        settings["data_sets"] = sets | {name: [_dataset(name)] for name in exceptions}
        expected["vit_b16"] |= exceptions
        mode = expected["train_mode"]
        mode |= {name: number(mode[name]) for name in ("vit_dropout", "swin_drop_path")}
        mode["mixed_precision"] = "16-mixed" if "scaler" in str(mode["mixed_precision"]) else mode["mixed_precision"]
        expected["seed"] = number(str(expected["seed"]))
    elif kind == "selection":
        for benchmark in ("fgvc", "vtab"):
            each = expected[benchmark]
            each["reported"] = [
                "best" if "checkpoint-best" in each["reported"] else "last",
                next(word for word in each["reported"].replace(";", " ").split() if word.startswith("test.")),
            ]
            if "chosen_on" in each:
                each["chosen_on"] = each["chosen_on"].split()[0]
        expected["counting"] = number(expected["counting"])
    elif kind == "trajectory":
        settings["weights"] = seed(settings["weights"])
        settings["batch"]["images"] = drawn(settings["batch"]["images"])
    return facts


def parity(old: Old) -> dict[str, Any]:
    """The calls and taps of any case, by the authors' class and file."""
    module = old.facts["module"]
    for start, made in {
        "CrossAttention of vit": _part,
        "Cross_Block of": _part,
        "Embeddings of vit": _embeddings,
        "train_class_batch of": _loss,
        "Dual_model(SwinTransformer": _swin,
        "Dual_model(VisionTransformer": _vit,
    }.items():
        if module.startswith(start):
            return made(old)
    raise ValueError(f"{old.folder}: {module}")


def _attention(old: Old) -> str:
    return "padded" if "_acc.py" in old.facts["module"] else "aligned"


def _part(old: Old) -> dict[str, Any]:
    """An interaction alone, by `tests/parity/sa2vp.py`: the model has no such part under the authors' names."""
    tokens = old.shape("kv")[1]
    return {
        "code": "interaction",
        "inputs": {"kv": old.input("kv"), "q": old.input("q")},
        "settings": {
            "swin": "swin" in old.facts["module"],
            "dim": old.config["dim"],
            "heads": old.config["heads"],
            "width": old.config.get("inter_dim", 1),
            "side": math.isqrt(tokens),  # of the grid; a [CLS] token does not change it
            "attention": _attention(old),
            "rows": {name: numbers(old.facts["outputs"][name]) for name in old.shapes},
            "images": {name: shape[0] for name, shape in old.shapes.items()},
        },
    }


def _embeddings(old: Old) -> dict[str, Any]:
    names = ("image_tokens_rows", "prompt_tokens_rows")
    return {
        "code": "embeddings",
        "inputs": {"image": old.input("image")},
        "settings": {
            "image": old.config["image"],
            "patch": old.config["patch"],
            "width": old.config["inter_dim"],
            "rows": {name: numbers(old.facts["outputs"][name]) for name in names},
        },
    }


def _loss(old: Old) -> dict[str, Any]:
    return {
        "inputs": {
            "logits_image": old.input("logits_image"),
            "logits_prompt": old.input("logits_prompt"),
            "target": {"value": old.facts["targets"]},
        },
        "steps": [call("loss", f"{MODEL}two_pathway_loss", "$logits_image", "$logits_prompt", "$target")]
        + [
            call(name, "training.schedules:learning_rates", "cosine", base, int(epochs * iterations), int(warm), final)
            for name, (base, final, epochs, iterations, warm) in _schedules(old).items()
        ],
        "outputs": {"loss": "$loss"}
        | {f"lr {name}": tap(f"${name}", old.facts["schedule"][full]["steps"]) for name, full in _named(old).items()},
        "recorded": {f"lr {name}": old.facts["schedule"][full]["lr"] for name, full in _named(old).items()},
    }


def _named(old: Old) -> dict[str, str]:
    """The schedules of a case under short names."""
    return {f"schedule{i}": name for i, name in enumerate(old.facts.get("schedule", {}))}


def _schedules(old: Old) -> dict[str, tuple[float, float, float, float, float]]:
    """Base and final learning rate, epochs, steps of an epoch and of the warm-up: "base0.001_final1e-07_epochs..."."""
    found = {}
    for name, full in _named(old).items():
        base, final, epochs, iterations, warmup = (
            float(part.lstrip("abcdefghijklmnopqrstuvwxyz")) for part in full.split("_")
        )
        found[name] = (base, final, epochs, iterations, warmup * iterations)
    return found


def _trained(images: dict[str, Any], build: dict[str, Any], target: list[int]) -> dict[str, Any]:
    """The steps that all whole models share: build, run, loss, gradients."""
    return {
        "inputs": {"image": images, "target": {"value": target}},
        "steps": [
            build,
            call("logits", "$model", "$image"),
            call("blocks", "$model.forward_intermediates", "$image"),
            call("loss", f"{MODEL}two_pathway_loss", "$logits.0", "$logits.1", "$target"),
            {"name": "grad", "backward": "$loss", "of": "$model"},
        ],
        "outputs": {
            "logits_image": "$logits.0",
            "logits_prompt": "$logits.1",
            "loss": "$loss",
            "grad:*": {"each": "$grad", "apply": ["norm"]},
        },
    }


def _vit(old: Old) -> dict[str, Any]:
    config, rows = old.config, numbers(old.facts["outputs"]["*_into_blockN"])
    build = call(
        "model", f"{MODEL}SA2VP.from_official", "$state", heads=config["heads"], patch=config["patch"],
        scale=config["add_scale"], attention=_attention(old),
    )  # fmt: skip
    made = _trained(old.input("image"), build, old.facts["targets"])
    taps: dict[tuple[int, str], Any] = {}  # in the order of the forward pass, of which a wrong model changes the rest
    for name in old.shapes:
        if name.startswith("fusion_block"):
            block = int(name.removeprefix("fusion_block"))
            taps[block, name] = tap(f"$blocks.1.{block}.fusion", ":1", rows)
        elif "_tokens_" in name:  # image_tokens_into_block5, prompt_tokens_last
            pathway, _, where = name.partition("_tokens_")
            block = (config["depth"] if where == "last" else int(where.removeprefix("into_block"))) - 1
            taps[block, name] = tap(f"$blocks.1.{block}.{pathway}", ":1", rows)
    made["outputs"] = {name: taps[block, name] for block, name in sorted(taps)} | made["outputs"]
    return made


def _swin(old: Old) -> dict[str, Any]:
    """Both pathways pass the embedding and what is before the interaction one after the other, later as one batch."""
    config = old.config
    build = call(
        "model", "models.sa2vp.swin:SA2VPSwin.from_official", "$state",
        image_size=config["image"], heads=config["heads"], scale=config["add_scale"],
    )  # fmt: skip
    made = _trained(old.input("image"), build, old.facts["targets"])
    stages, images = len(config["depths"]), old.shape("image")[0]
    side = config["image"] // config["patch"]
    watched = {"embed": "$model.backbone.patch_embed.norm"}
    watched |= {f"after_stage{n}": f"$model.backbone.layers.{n}.downsample" for n in range(2, stages)}
    watched |= {f"after_stage{stages}": f"$model.backbone.layers.{stages - 1}"}
    made["steps"][1:1] = [{"name": name, "watch": module} for name, module in watched.items()]
    for name in watched:
        if name != "embed":
            made["steps"].append(call(f"{name}_both", "torch:cat", f"${name}"))
            made["steps"].append({"name": f"{name}_tokens", "of": f"${name}_both", "apply": [["flatten", 1, -2]]})
    for place in ("0", "1"):
        made["steps"].append({"name": f"embed{place}", "of": f"$embed.{place}", "apply": [["flatten", 1, -2]]})
    taps: dict[tuple[int, str], Any] = {}
    for name in old.shapes:
        pathway, _, place = name.partition("_tokens_")
        second = int(pathway == "prompt")
        if place == "embed":
            taps[0, name] = tap(f"$embed{second}", ":1", numbers(old.facts["outputs"]["*_embed"]))
        elif place in watched:
            stage, first = int(place[-1]), second * images
            length = (side >> min(stage, stages - 1)) ** 2
            rows = [0, 1, length // 2, length - 1]
            taps[stage, name] = tap(f"${place}_tokens", f"{first}:{first + 1}", rows)
    made["outputs"] = {name: taps[stage, name] for stage, name in sorted(taps)} | made["outputs"]
    return made
