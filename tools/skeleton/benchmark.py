"""NAME's training step compared with full fine-tuning of the same ViT-B/16."""

from __future__ import annotations

import functools

import torch
from bench import Step, run
from torch import nn

from companion import backbones
from companion.models.layers.classifying import FineTuning
from companion.models.SLUG import NAME, loss

BATCH = 4


def step_of(kind: type[nn.Module]) -> Step:
    torch.manual_seed(0)
    model = kind(backbones.build("vit_b16", "random"), 100).train()
    batch = torch.randn(BATCH, 3, 224, 224), torch.arange(BATCH)

    def step() -> None:
        loss(model, batch).backward()
        model.zero_grad()

    return step


if __name__ == "__main__":
    names = {
        "NAME, training step": functools.partial(step_of, NAME),
        "full fine-tuning, training step": functools.partial(step_of, FineTuning),
    }
    first, second = names
    run("SLUG", f"ViT-B/16, batch {BATCH}", names, [("training step / full fine-tuning", first, second)])
