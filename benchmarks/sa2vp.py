"""SA²VP's training step and forward pass compared with the plain ViT-B/16 passes that it cannot avoid.

Two pathways go through the frozen encoder, so two forward passes are the lower bound. From the second block on both
need gradients (the image pathway through the adapters, the prompt pathway through the maps), so a backward pass goes
through both, for the tokens alone: the frozen weights get no gradient. The reference is this bound: the plain timm
encoder on twice the batch, its tokens requiring a gradient. The narrower reference, one backward through the prompt
pathway alone, is printed too: no exact training step can reach it.
"""

from __future__ import annotations

import functools

import torch
from bench import Step, run
from torch.nn import functional as F

from companion import backbones
from companion.models.sa2vp import SA2VP, two_pathway_loss

BATCH, CLASSES = 4, 100


def plain():
    """A frozen ViT-B/16 and its tokens for a batch."""
    torch.manual_seed(0)
    vit = backbones.build("vit_b16", "random").requires_grad_(False)
    with torch.no_grad():
        tokens = torch.cat([vit.cls_token.expand(BATCH, -1, -1), vit.patch_embed(torch.randn(BATCH, 3, 224, 224))], 1)
    return vit, tokens + vit.pos_embed


def ours(train: bool, dropout: float = 0.0) -> Step:
    torch.manual_seed(0)
    model = SA2VP(backbones.build("vit_b16", "random"), CLASSES, dropout=dropout).train(train)
    images, target = torch.randn(BATCH, 3, 224, 224), torch.randint(CLASSES, (BATCH,))
    if not train:
        return torch.no_grad()(lambda: model(images))
    optimizer = torch.optim.AdamW(model.trained().values(), lr=1e-3)

    def step():
        two_pathway_loss(*model(images), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def both_passes() -> Step:
    vit, tokens = plain()
    tokens = torch.cat([tokens, tokens]).requires_grad_()

    def step():
        F.cross_entropy(vit.norm(vit.blocks(tokens))[:, 0], torch.zeros(2 * BATCH, dtype=torch.long)).backward()
        tokens.grad = None

    return step


def one_backward() -> Step:
    vit, tokens = plain()
    prompts = tokens.clone().requires_grad_()

    def step():
        with torch.no_grad():
            vit.blocks(tokens)
        F.cross_entropy(vit.norm(vit.blocks(prompts))[:, 0], torch.zeros(BATCH, dtype=torch.long)).backward()
        prompts.grad = None

    return step


def two_forward() -> Step:
    vit, tokens = plain()
    tokens = torch.cat([tokens, tokens])
    return torch.no_grad()(lambda: vit.norm(vit.blocks(tokens)))


if __name__ == "__main__":
    names = {
        "SA²VP, training step": functools.partial(ours, True),
        "SA²VP, training step with the released dropout": functools.partial(ours, True, 0.1),
        "plain encoder: 2 forward, backward of both": both_passes,
        "plain encoder: 2 forward, 1 backward": one_backward,
        "SA²VP, forward": functools.partial(ours, False),
        "plain encoder: 2 forward": two_forward,
    }
    step, dropped, reference, narrow, forward, least = names
    run(
        "sa2vp",
        f"ViT-B/16, batch {BATCH}, r = 16",
        names,
        [
            ("training step / two passes forward and back", step, reference),
            ("the same with dropout 0.1 in the frozen blocks", dropped, reference),
            ("training step / two passes forward, one back", step, narrow),
            ("forward / two passes forward", forward, least),
        ],
    )
