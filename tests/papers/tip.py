"""TIP: COCO with captions, DIV2K, and a folder of one's own."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from companion.data import restoration
from companion.io.files import write_json
from companion.training.hardware import Hardware
from companion.training.recipe import run
from tests.data.conftest import expect
from tests.data.test_restoration import picture
from tests.papers.common import Fault, Found, Training, images, moved, spoil, without

# --- runs of the `paper` profile on miniatures of the data sets, and copies that people have


def write(name: str, root: Path, patch: pytest.MonkeyPatch) -> None:
    """Images of 40 x 36 pixels."""
    if name == "restoration/coco":
        expect(patch, name, sizes={"train": 6, "test": 3})
        for split, count in (("train", 6), ("val", 3)):
            images = [{"id": i, "file_name": f"{split}{i}.jpg", "height": 36, "width": 40} for i in range(count)]
            captions = [{"id": i, "image_id": i, "caption": f"a zebra, number {i}"} for i in range(count)]
            write_json(
                root / f"coco/annotations/captions_{split}2017.json", {"images": images, "annotations": captions}
            )
            for i in range(count):
                picture(root / f"coco/{split}2017/{split}{i}.jpg", (40, 36), i)
    elif name == "restoration/div2k":
        few = {"train": (range(1, 7), ""), "test": (range(801, 804), "")}
        patch.setattr(restoration, "DIV2K", few)
        for split, (numbers, _) in few.items():
            for i in numbers:
                picture(root / "DIV2K" / restoration.FOLDERS[name][split] / f"{i:04d}.png", (40, 36), i)
    else:
        for i in range(6):
            picture(root / "images" / f"{i}.png", (40, 36), i)
        lines = [json.dumps({"file": f"{i}.png", "caption": f"a zebra, number {i}"}) for i in range(6)]
        (root / "captions.jsonl").write_text("\n".join(lines))


SMALL = {"size": 64}
COCO = {"dataset": "restoration/coco"} | SMALL
RUNS = [
    COCO,
    COCO | {"degradation": "real-esrgan", "method": "plain ControlNet"},
    {"dataset": "restoration/div2k"} | SMALL,
    {"dataset": "folder", "grad_checkpointing": True} | SMALL,
]


def overlap(root: Path) -> Path:
    """One image, listed twelve times: every tenth is tested."""
    (root / "captions.jsonl").write_text('{"file": "1.png", "caption": ""}\n' * 12)
    return Path("1.png")


NO_CAPTIONS = '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": []}'
FAULTS = {
    "missing captions": Fault(COCO, spoil("coco/annotations/captions_val2017.json"), "captions_val2017"),
    "captions of another set": Fault(
        COCO, spoil("coco/annotations/captions_train2017.json", NO_CAPTIONS), "1 images .* 6 "
    ),
    "a missing image": Fault(COCO, spoil("coco/train2017/train3.jpg"), "train3"),
    "an unreadable image": Fault(COCO, spoil("coco/train2017/train0.jpg", "no image"), "train0"),
    "splits that overlap": Fault({"dataset": "folder"} | SMALL, overlap, "twice"),
}


DIV2K = {"dataset": "restoration/div2k"}
HIGH = "DIV2K/DIV2K_train_HR"
ANNOTATED = "coco/annotations/captions_train2017.json"
COPIES = {
    "Kaggle's folder of DIV2K": Fault(DIV2K, moved(HIGH, f"{HIGH}/DIV2K_train_HR"), ""),
    "DIV2K with a hole": Fault(DIV2K, without(f"{HIGH}/0006.png"), "DIV2K_train_HR/0006.png"),
    "images of low quality in place of DIV2K": Fault(
        DIV2K, moved(HIGH, "DIV2K/DIV2K_train_LR"), "(?s)0001.png.*holds DIV2K_train_LR, DIV2K_valid_HR"
    ),
    "images of COCO in images/": Fault(COCO, moved("coco/val2017", "coco/images/val2017"), ""),
    "captions next to the images of COCO": Fault(COCO, moved(ANNOTATED, "coco/captions_train2017.json"), ""),
    "no captions of COCO": Fault(COCO, without(ANNOTATED), "(?s)captions_train2017.json.*annotations_trainval2017.zip"),
    "an image of COCO that is missing": Fault(
        COCO, without("coco/train2017/train0.jpg"), "images of captions_train2017.json .*train0.jpg"
    ),
}


# --- small models


SMALL_SD: dict[str, Any] = {  # two levels instead of Stable Diffusion's four
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (32, 48),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
    "vae": {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "scaling_factor": 0.18215,
    },
    "text": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "conditioning_channels": (16, 24, 32),
}


def small_pipe(size: str = "sd15", **options: object) -> torch.nn.Module:
    """TIP's pipeline, which predicts x0 and starts from noise alone."""
    from companion.models.tip import build
    from companion.toy.encoders.texture_prior import scheduler

    torch.manual_seed(0)
    pipe = build("sd15", **SMALL_SD | options)
    pipe.register_modules(scheduler=scheduler())
    return pipe


def small(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recipe, "build", small_pipe)
    cached = functools.partial(recipe.TIPPipeline.from_stable_diffusion, download=False)
    patch.setattr(recipe.TIPPipeline, "from_stable_diffusion", cached)
    patch.setattr(recipe, "DRY_SIZE", 32)


# --- trainings


def train(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    pipe, p.dry_run = recipe.build(), False
    data = recipe.samples(recipe.Generated(4, p.size, 0), p.size, p.method, 0)
    with mock.patch.multiple(recipe, EPOCHS=1, BATCH=2):
        _, history = run(recipe.training(p, pipe, data))
    restored = recipe.restore(pipe, [data[i] for i in range(2)], steps=2, hardware=Hardware.of(p, "tip"))
    assert restored.dtype == torch.float32 and 0 <= restored.min() < restored.max() <= 1
    return history, None


MODELS: dict[str, Any] = {}  # its pipeline is a folder, which diffusers writes
TRAININGS = {
    # too large for the machine on which memory is counted: no `runs`
    "": Training(train, {"size": 32}, batch=8, full={"size": 512})
}


# --- the example on own data


def photographs() -> None:
    images(Path("photographs/images"), [f"{i}.jpg" for i in range(4)])
    images(Path(), ["old.jpg"])


EXAMPLE = photographs, ""


def small_example(patch: pytest.MonkeyPatch) -> None:
    from companion.models.tip import TIPPipeline, degradations

    degraded = degradations.Degraded
    patch.setattr(degradations, "Degraded", lambda images, size: degraded(images, size // 16))
    patch.setattr(TIPPipeline, "from_stable_diffusion", small_pipe)
