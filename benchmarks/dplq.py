"""DPLQ's training step and forward pass beside the plain passes that they cannot avoid.

Every image has text prompts of its own, so the text tower reads images x classes texts. Both towers carry a gradient
from their first block on (to the context and to the first image prompts), and the domain model runs forward. The
reference is that and nothing else: CLIP's own blocks on tokens that ask for a gradient, as many and as long as DPLQ's,
and the domain model. The second reference is DPLQ with texts of 77 positions, as released: the text tower is causal, so
what comes after the end of a text cannot matter, and ours cuts it off.
"""

from __future__ import annotations

import functools

import bench
import open_clip
import torch
from bench import Step

from companion import backbones
from companion.data.domains_sets import CLASSES
from companion.data.fewshot import halves
from companion.models.dplq import DPLQ, domain_model

BATCH, DEPTH = 2, 9
NAMES, _ = halves(tuple(CLASSES["remote/aid"].values()))  # the 15 base classes of AID


def build() -> DPLQ:
    """DPLQ at full size, with random weights."""
    torch.manual_seed(0)
    clip = backbones.build("openclip:ViT-B-16/openai", "random")
    domain = domain_model("remote-sensing", "random", clip=clip)
    return DPLQ(clip, NAMES, open_clip.get_tokenizer("ViT-B-16"), domain, depth=DEPTH).eval()


def images() -> torch.Tensor:
    return torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def ours(train: bool, whole_texts: bool = False) -> Step:
    model, pictures, target = build().train(train), images(), torch.arange(BATCH)
    if whole_texts:
        model.length = model.embedded.shape[1]
    if not train:
        return torch.inference_mode()(lambda: model(pictures))
    optimizer = torch.optim.SGD(model.trained().values(), lr=3.5e-3, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        torch.nn.functional.cross_entropy(model(pictures), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain(train: bool) -> Step:
    """Both towers' blocks on as many tokens, and the domain model; with `train` back to the tokens too."""
    model, pictures = build(), images()
    clip, length = model.clip, model.length
    patches = clip.visual.positional_embedding.shape[0]
    seen = torch.randn(BATCH, patches + len(model.ctx), clip.visual.conv1.out_channels)
    read = torch.randn(BATCH * len(NAMES), length, model.ctx.shape[1])
    mask = clip.attn_mask[:length, :length]

    def step() -> None:
        with torch.no_grad():
            model.domain(pictures)
        outputs = clip.visual.transformer(seen)[:, 0].sum() + clip.transformer(read, attn_mask=mask)[:, -1].sum()
        if train:
            outputs.backward()
            seen.grad = read.grad = None

    if train:
        seen.requires_grad_()
        read.requires_grad_()
        return step
    return torch.inference_mode()(step)


@torch.inference_mode()
def check() -> None:
    """Raises when cutting the texts after their ends changes a logit by more than float32 rounds."""
    model, pictures, noise = build(), images(), torch.zeros(BATCH, 512)
    cut = model(pictures, eps=noise)
    model.length = model.embedded.shape[1]
    torch.testing.assert_close(cut, model(pictures, eps=noise), rtol=1e-4, atol=1e-4)


def main() -> None:
    check()
    makers = {
        "DPLQ, training step": functools.partial(ours, True),
        "DPLQ, training step, texts of 77 positions": functools.partial(ours, True, True),
        "plain towers forward and back, domain model forward": functools.partial(plain, True),
        "DPLQ, forward": functools.partial(ours, False),
        "DPLQ, forward, texts of 77 positions": functools.partial(ours, False, True),
        "plain towers and domain model, forward": functools.partial(plain, False),
    }
    step, step_77, least_step, forward, forward_77, least = makers
    bench.run(
        "dplq",
        f"CLIP ViT-B/16, MAE ViT-B/16, batch {BATCH}, {len(NAMES)} classes, 2 tokens, depth {DEPTH}",
        makers,
        [
            ("training step / plain passes of both towers and the domain model", step, least_step),
            ("training step / the same with texts of 77 positions, as released", step, step_77),
            ("forward / plain passes", forward, least),
            ("forward / the same with texts of 77 positions, as released", forward, forward_77),
        ],
        rounds=3,
    )


if __name__ == "__main__":
    main()
