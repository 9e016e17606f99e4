"""DPLQ's training step and forward pass compared with the plain passes that they cannot avoid.

Every image has its own text prompts, so the text tower encodes images x classes texts. Both towers need gradients from
their first block on (to the context and to the first image prompts), and the domain model runs forward. The reference
is these passes alone: CLIP's own blocks on tokens that require a gradient, of the same shape as DPLQ's, and the domain
model. The second reference is DPLQ with texts of 77 positions, as released: the text tower is causal, so the padding
after the end of a text has no effect, and ours truncates it. The third is MaPLe, whose texts are the same for all
images: it encodes the class prompts once per step.

What a cached domain feature saves depends on the domain model, so both are timed: the MAE ViT-B/16 of remote sensing,
and the SAM ViT-B of the medical sets, which reads 1024 x 1024 pixels (one image a step here, to save memory).
"""

from __future__ import annotations

import functools

import bench
import open_clip
import torch
from bench import Step

from companion import backbones
from companion.data.domains import CLASSES
from companion.data.fewshot import halves
from companion.models.dplq import DPLQ, domain_model
from companion.models.dplq.baselines import MaPLe
from companion.models.layers.clip_prompting import PromptedCLIP

BATCH, DEPTH = 2, 9
NAMES, _ = halves(tuple(CLASSES["remote/aid"].values()))  # the 15 base classes of AID


def build(domain: str = "remote-sensing") -> DPLQ:
    """DPLQ at full size, with random weights."""
    torch.manual_seed(0)
    clip = backbones.build("openclip:ViT-B-16/openai", "random")
    encoder = domain_model(domain, "random", clip=clip)
    return DPLQ(clip, NAMES, open_clip.get_tokenizer("ViT-B-16"), encoder, depth=DEPTH).eval()


def images(count: int = BATCH) -> torch.Tensor:
    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def training(model: PromptedCLIP, *inputs: torch.Tensor) -> Step:
    """A step of the authors' optimiser on `inputs`, the first of them the images."""
    model.train()
    target = torch.arange(len(inputs[0]))
    optimizer = torch.optim.SGD(model.trained().values(), lr=3.5e-3, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        torch.nn.functional.cross_entropy(model(*inputs), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(train: bool, whole_texts: bool = False) -> Step:
    model, batch = build(), images()
    if whole_texts:
        model.length = model.embedded.shape[1]
    return training(model, batch) if train else torch.inference_mode()(lambda: model(batch))


def cached(domain: str, count: int) -> Step:
    """A training step with given domain features."""
    model, batch = build(domain), images(count)
    width = model.meta_net.linear1.in_features
    return training(model, batch, torch.randn(count, width, generator=torch.Generator().manual_seed(2)))


def computed(domain: str, count: int) -> Step:
    """A training step that computes them."""
    return training(build(domain), images(count))


def maple(whole_texts: bool = False) -> Step:
    torch.manual_seed(0)
    clip = backbones.build("openclip:ViT-B-16/openai", "random")
    model = MaPLe(clip, NAMES, open_clip.get_tokenizer("ViT-B-16"), depth=DEPTH)
    if whole_texts:
        model.length = model.embedded.shape[1]
    return training(model, images())


def plain(train: bool) -> Step:
    """Both towers' blocks on the same number of tokens, and the domain model; with `train` also backward to the
    tokens."""
    model, batch = build(), images()
    clip, length = model.clip, model.length
    patches = clip.visual.positional_embedding.shape[0]
    seen = torch.randn(BATCH, patches + len(model.ctx), clip.visual.conv1.out_channels)
    read = torch.randn(BATCH * len(NAMES), length, model.ctx.shape[1])
    mask = clip.attn_mask[:length, :length]

    def step() -> None:
        with torch.no_grad():
            model.domain(batch)
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
    """Raises when truncating the texts at their ends changes a logit by more than float32 rounding."""
    model, batch, noise = build(), images(), torch.zeros(BATCH, 512)
    cut = model(batch, eps=noise)
    model.length = model.embedded.shape[1]
    torch.testing.assert_close(cut, model(batch, eps=noise), rtol=1e-4, atol=1e-4)


def main() -> None:
    check()
    makers = {
        "DPLQ, training step": functools.partial(ours, True),
        "DPLQ, training step, texts of 77 positions": functools.partial(ours, True, True),
        "plain towers forward and back, domain model forward": functools.partial(plain, True),
        "DPLQ, forward": functools.partial(ours, False),
        "DPLQ, forward, texts of 77 positions": functools.partial(ours, False, True),
        "plain towers and domain model, forward": functools.partial(plain, False),
        "MaPLe, training step": maple,
        "MaPLe, training step, texts of 77 positions": functools.partial(maple, True),
        "DPLQ, training step, domain feature cached": functools.partial(cached, "remote-sensing", BATCH),
        "DPLQ, training step, one image, medical model": functools.partial(computed, "medical", 1),
        "DPLQ, training step, one image, medical feature cached": functools.partial(cached, "medical", 1),
    }
    step, step_77, least_step, forward, forward_77, least, maple_step, maple_77, kept, medical, medical_kept = makers
    bench.run(
        "dplq",
        f"CLIP ViT-B/16, MAE ViT-B/16, batch {BATCH}, {len(NAMES)} classes, 2 tokens, depth {DEPTH}",
        makers,
        [
            ("training step / plain passes of both towers and the domain model", step, least_step),
            ("training step / the same with texts of 77 positions, as released", step, step_77),
            ("forward / plain passes", forward, least),
            ("forward / the same with texts of 77 positions, as released", forward, forward_77),
            ("training step / MaPLe's, which reads the texts once for all images", step, maple_step),
            ("training step / MaPLe's with texts of 77 positions, as released", step, maple_77),
            ("training step, MAE feature cached / computed", kept, step),
            ("training step, SAM feature cached / computed", medical_kept, medical),
        ],
        rounds=2,
    )


if __name__ == "__main__":
    main()
