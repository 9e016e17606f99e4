"""DMT's step beside its parts, an epoch from cached teachers beside one that asks them, and our ViT beside timm's.

A step of three teachers costs what it cannot avoid, three teacher forwards and a student's step, and what comes on top:
norms of targets, adapters, fusion, losses. That is to cost at most a tenth. The student's step beside it is a whole
one, the decoder included, without targets. An epoch of cached teachers is to be at least twice as fast as one that asks
them: that ratio is to be at most 0.5.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import bench
import torch
from bench import Step
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from companion.models.dmt import cache as dmt_cache
from companion.models.dmt import model as dmt

PICTURES, NAMES, SEEN, DECODER = 4, ("MAE", "MoCo v3", "iBOT"), 49, (256, 4, 8)


def teachers() -> dmt.Teachers:
    """Three ViT-B/16 with random weights."""
    torch.manual_seed(0)
    return dmt.Teachers({name: dmt.build("base") for name in NAMES})


def pictures() -> torch.Tensor:
    return torch.randn(PICTURES, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def step() -> Step:
    """A training step of ViT-S under three teachers, targets standardised by channel with running statistics."""
    model, images = dmt.DMT(dmt.build("small"), teachers(), statistics="running").train(), pictures()

    def run() -> None:
        model(images).total.backward()
        model.zero_grad()

    return run


class Student(nn.Module):
    """timm's blocks as the student, its decoder and a linear layer to each teacher: nothing else of DMT."""

    def __init__(self):
        super().__init__()
        width, depth, heads = DECODER
        self.vit = VisionTransformer(img_size=224, embed_dim=384, num_heads=6, num_classes=0)
        norm = partial(nn.LayerNorm, eps=1e-6)
        blocks = (Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.decoder = nn.Sequential(nn.Linear(384, width), *blocks, norm(width))
        self.adapters = nn.ModuleList(nn.Linear(384, 768) for _ in NAMES)
        self.heads = nn.ModuleList(nn.Linear(width, 768) for _ in NAMES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        z = self.vit.norm(self.vit.blocks(self.vit.patch_embed(images)[:, : SEEN + 1]))
        decoded = self.decoder(nn.functional.pad(z, (0, 0, 0, 196 - SEEN)))
        outputs = [adapter(z) for adapter in self.adapters] + [head(decoded) for head in self.heads]
        return sum(x.square().mean() for x in outputs)


def parts() -> Step:
    """timm's ViT-B three times forward without gradients, and the plain student forward and back."""
    torch.manual_seed(0)
    found = [VisionTransformer(img_size=224, num_classes=0).eval() for _ in NAMES]
    student, images = Student().train(), pictures()

    def run() -> None:
        with torch.no_grad():
            for teacher in found:
                teacher.forward_features(images)
        student(images).backward()
        student.zero_grad()

    return run


def epoch(cached: bool) -> Step:
    """Eight pictures in two batches, from the loader on: tokens are read from the disk's cache, or asked for."""
    taught_by = teachers()
    generator = torch.Generator().manual_seed(0)
    views = dmt_cache.Views(torch.randn(2 * PICTURES, 3, 224, 224, generator=generator))
    model = dmt.DMT(dmt.build("small"), taught_by.widths if cached else taught_by, statistics="running").train()
    data = TensorDataset(views.pictures)
    if cached:
        folder = tempfile.TemporaryDirectory()
        data = dmt_cache.Distilled(views, dmt_cache.build(Path(folder.name), taught_by, views, batch=PICTURES))
        data.folder = folder  # it goes when the data goes

    def run() -> None:
        for batch in DataLoader(data, PICTURES):
            dmt.loss(model, batch).backward()
            model.zero_grad()

    return run


def asked() -> Step:
    return epoch(cached=False)


def cached() -> Step:
    return epoch(cached=True)


def forward(ours: bool) -> Step:
    """ViT-B/16 on whole pictures, without gradients."""
    torch.manual_seed(0)
    images = pictures()
    model = (dmt.build("base") if ours else VisionTransformer(img_size=224, num_classes=0)).eval()
    call = model if ours else model.forward_features

    def run() -> None:
        with torch.no_grad():
            call(images)

    return run


def ours() -> Step:
    return forward(ours=True)


def timms() -> Step:
    return forward(ours=False)


def main() -> None:
    makers = {
        "three teachers, training step": step,
        "three ViT-B forward, student forward and back": parts,
        "epoch that asks the teachers": asked,
        "epoch from the cache": cached,
        "our ViT-B, forward": ours,
        "timm's ViT-B, forward": timms,
    }
    whole, alone, slow, quick, first, second = makers
    bench.run(
        "dmt",
        f"three ViT-B/16 teach ViT-S/16, {PICTURES} pictures of 224 px",
        makers,
        [
            ("training step / three teacher forwards and the student's step alone", whole, alone),
            ("epoch from cached teachers / epoch that asks them", quick, slow),
            ("our ViT-B / timm's ViT-B, forward", first, second),
        ],
        rounds=3,
    )


if __name__ == "__main__":
    main()
