"""DMT's step next to its parts, an epoch from cached teachers next to one that runs them, our ViT next to timm's.

A step with three teachers consists of three teacher forward passes and a student step, plus target norms, adapters,
fusion and losses. These additions should cost at most a tenth. The student step of the reference includes the decoder,
without targets. An epoch with cached teachers should be at least twice as fast as one that runs them: a ratio of at
most 0.5.
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

from companion.models.dmt import DMT, Teachers, build, loss
from companion.models.dmt import cache as dmt_cache

IMAGES, NAMES, SEEN, DECODER = 4, ("MAE", "MoCo v3", "iBOT"), 49, (256, 4, 8)


def teachers() -> Teachers:
    """Three ViT-B/16 with random weights."""
    torch.manual_seed(0)
    return Teachers({name: build("base") for name in NAMES})


def images_of_a_batch() -> torch.Tensor:
    return torch.randn(IMAGES, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def step() -> Step:
    """A training step of ViT-S under three teachers, targets standardised by channel with running statistics."""
    model, images = DMT(build("small"), teachers(), statistics="running").train(), images_of_a_batch()

    def run() -> None:
        model(images).total.backward()
        model.zero_grad()

    return run


class Student(nn.Module):
    """timm's blocks as the student, its decoder and a linear layer per teacher; no other part of DMT."""

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
    """timm's ViT-B three times forward without gradients, and the plain student forward and backward."""
    torch.manual_seed(0)
    found = [VisionTransformer(img_size=224, num_classes=0).eval() for _ in NAMES]
    student, images = Student().train(), images_of_a_batch()

    def run() -> None:
        with torch.no_grad():
            for teacher in found:
                teacher.forward_features(images)
        student(images).backward()
        student.zero_grad()

    return run


def epoch(cached: bool) -> Step:
    """Eight images in two batches, including the loader: tokens are read from the disk cache or computed."""
    found = teachers()
    generator = torch.Generator().manual_seed(0)
    views = dmt_cache.Views(torch.randn(2 * IMAGES, 3, 224, 224, generator=generator))
    model = DMT(build("small"), found.widths if cached else found, statistics="running").train()
    data = TensorDataset(views.images)
    if cached:
        folder = tempfile.TemporaryDirectory()
        data = dmt_cache.fill(Path(folder.name), found, views, batch=IMAGES)
        data.temporary = folder  # deleted with the data

    def run() -> None:
        for batch in DataLoader(data, IMAGES):
            loss(model, batch)["loss"].backward()
            model.zero_grad()

    return run


def uncached() -> Step:
    return epoch(cached=False)


def cached() -> Step:
    return epoch(cached=True)


def forward(ours: bool) -> Step:
    """ViT-B/16 on whole images, without gradients."""
    torch.manual_seed(0)
    images = images_of_a_batch()
    model = (build("base") if ours else VisionTransformer(img_size=224, num_classes=0)).eval()
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
        "epoch that runs the teachers": uncached,
        "epoch from the cache": cached,
        "our ViT-B, forward": ours,
        "timm's ViT-B, forward": timms,
    }
    whole, alone, slow, quick, first, second = makers
    bench.run(
        "dmt",
        f"three ViT-B/16 teach ViT-S/16, {IMAGES} images of 224 px",
        makers,
        [
            ("training step / three teacher forwards and the student's step alone", whole, alone),
            ("epoch from cached teachers / epoch that runs the teachers", quick, slow),
            ("our ViT-B / timm's ViT-B, forward", first, second),
        ],
        rounds=3,
    )


if __name__ == "__main__":
    main()
