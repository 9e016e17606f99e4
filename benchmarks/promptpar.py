"""PromptPAR's training step and forward pass, compared with the released formulation and with CLIP's own passes.

The reference runs the network as the released code does (section 3 of the method, line by line): the sentences go
through the text tower at every step, with prompts that have no effect; prompts are inserted group by group at each
layer and run through the block like any token; attention returns its unused map; the similarity loops over the images,
the heads over the attributes; and all tokens leave the fusion block, though only the attributes' are used. Ours is
checked to give the same outputs and gradients before anything is timed.

The fraction of time spent on the sentences depends on the batch size, 16 as published and 4 here. So there is a second
reference: the released formulation with the sentences encoded once, the limit of a very large batch. The third is a
lower bound: CLIP's own blocks, on as many tokens without prompts, forward and backward.
"""

from __future__ import annotations

import functools

import bench
import open_clip
import torch
from bench import Step
from torch import Tensor
from torch.nn import functional as F

from companion import backbones
from companion.data.attributes import SENTENCES
from companion.models.promptpar import Output, PromptPAR, Settings, loss
from companion.models.promptpar.model import region_mask

BATCH = 4
SET = "par/pa100k"  # 26 sentences


@functools.cache  # one model for all steps timed in a process
def build() -> PromptPAR:
    """PromptPAR at full size, with random weights."""
    torch.manual_seed(0)
    clip = backbones.build("openclip:ViT-L-14-quickgelu/openai", "random")
    fusion = backbones.build("vit_base_patch16_224.orig_in21k_ft_in1k", "random")
    tokenizer = open_clip.get_tokenizer("ViT-L-14-quickgelu")
    model = PromptPAR(clip, SENTENCES[SET], tokenizer, fusion, Settings(official_quirks=True))
    model.text_prompts.requires_grad_()  # as released
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, and the share of images with each attribute."""
    generator, count = torch.Generator().manual_seed(1), len(SENTENCES[SET])
    images = torch.randn(BATCH, 3, 224, 224, generator=generator)
    labels = (torch.rand(BATCH, count, generator=generator) < 0.3).float()
    return images, labels, torch.full((count,), 0.3)


# --- the reference ----------------------------------------------------------------------------------------------------


def block_with_map(block: torch.nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    h = block.ln_1(x)
    attended, _ = block.attn(h, h, h, need_weights=True, attn_mask=mask)
    x = x + attended
    return x + block.mlp(block.ln_2(x))


def sentence_features(model: PromptPAR) -> Tensor:
    clip = model.clip
    x = model.embedded + clip.positional_embedding
    length, n = x.shape[1], model.text_prompts.shape[1]
    mask = torch.full((length + n, length + n), -torch.inf).triu(1)
    for prompts, block in zip(model.text_prompts, clip.transformer.resblocks, strict=True):
        x = block_with_map(block, torch.cat([x[:, :length], prompts.transpose(0, 1)], 1), mask)
    return clip.ln_final(x)[torch.arange(len(x)), model.ends] @ clip.text_projection


def image_tokens(model: PromptPAR, images: Tensor, mask: Tensor) -> Tensor:
    visual, b = model.clip.visual, len(images)
    patches = visual.conv1(images).flatten(2).mT
    x = torch.cat([visual.class_embedding.expand(b, 1, -1), patches], 1) + visual.positional_embedding
    x = visual.ln_pre(torch.cat([x[:, :1], model.region_tokens.expand(b, -1, -1), x[:, 1:]], 1))
    group = model.prompts.shape[1] // 5
    for i, block in enumerate(visual.transformer.resblocks):
        for r in range(5):
            start = r * (group + 1) + 1
            prompts = model.prompts[i, group * r : group * (r + 1)].repeat(b, 1, 1)
            x = torch.cat([x[:, :start], prompts, x[:, start if i == 0 else start + group :]], 1)
        x = block_with_map(block, x, mask)
    return x @ visual.proj


def released(model: PromptPAR, images: Tensor, mask: Tensor, text: Tensor | None) -> Output:
    """The output of `model(images)`, computed as in the released code; `text`: cached features of the sentences."""
    tokens = image_tokens(model, images, mask)
    text = sentence_features(model) if text is None else text
    _, shares = model.similarities(tokens[:, model.class_positions])
    for share in shares[:, 1:]:
        highest, lowest = share.amax(0), share.amin(0)
        gate = (highest > model.settings.threshold).float()
        local = gate * highest + (1 - gate) * lowest
    x = torch.cat([model.word_embed(text).expand(len(images), -1, -1), tokens], 1)
    for block in model.blocks:
        x = block(x)
    x, heads = model.norm(x), model.heads
    logits = [F.linear(x[:, i], heads.weight[i], heads.bias[i]) for i in range(len(text))]
    return Output(model.bn(torch.cat(logits, 1)), model.agg_bn((local + shares[:, 0]) / 2))


# --- what is timed ----------------------------------------------------------------------------------------------------


def forward(how: str, model: PromptPAR, images: Tensor) -> Output:
    if how == "ours":
        return model.decide(model.forward_features(images))[0]
    mask = torch.zeros(311, 311).masked_fill(region_mask((16, 16), 50), -torch.inf)
    return released(model, images, mask, model.text_features if how == "released, sentences read once" else None)


def step(how: str, train: bool) -> Step:
    """A training step with the authors' two optimisers, or a forward pass."""
    model, (images, labels, ratio) = build(), inputs()
    if not train:
        return torch.inference_mode()(lambda: forward(how, model.eval(), images))
    learning_rates, groups = {"heads": 8e-3, "prompts": 4e-3}, model.param_groups()
    optimizers = [torch.optim.SGD(g["params"], learning_rates[g["name"]], 0.9, weight_decay=1e-4) for g in groups]

    def run() -> None:
        loss(forward(how, model.train(), images), labels, ratio).backward()
        for group, optimizer in zip(groups, optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(group["params"], 10.0)
            optimizer.step()
            optimizer.zero_grad()

    return run


def plain(train: bool) -> Step:
    """CLIP's own blocks on CLS, the regions' [CLS] tokens and the patches; with `train` also backward to the tokens."""
    tower = build().clip.visual.transformer
    tokens = torch.randn(BATCH, 1 + 4 + 256, 1024, generator=torch.Generator().manual_seed(2))

    def run() -> None:
        output = tower(tokens)
        if train:
            output.sum().backward()
            tokens.grad = None

    if train:
        tokens.requires_grad_()
        return run
    return torch.inference_mode()(run)


def check() -> None:
    """Raises when ours and the reference differ by more than float32 rounding, in outputs or gradients."""
    model, (images, labels, ratio) = build().eval(), inputs()
    found = {}
    for how in ("ours", "released"):
        output = forward(how, model, images)
        loss(output, labels, ratio).backward()
        gradients = {n: p.grad for n, p in model.trained().items() if n != "text_prompts"}
        found[how] = [*output, *gradients.values()]
        if how == "released" and model.text_prompts.grad.abs().max() > 0:
            raise AssertionError("the text prompts have a gradient")
        model.zero_grad(set_to_none=True)
    for ours, theirs in zip(*found.values(), strict=True):
        error = (ours - theirs).norm() / theirs.norm()
        if error > 1e-3:
            raise AssertionError(f"{tuple(ours.shape)} differs by {error:.1e} of its norm")


def main() -> None:
    check()
    ways = ("ours", "released", "released, sentences read once")
    makers = {f"{how}, training step": functools.partial(step, how, True) for how in ways}
    makers |= {"CLIP's blocks without prompts, forward and back": functools.partial(plain, True)}
    makers |= {f"{how}, forward": functools.partial(step, how, False) for how in ways}
    makers |= {"CLIP's blocks without prompts, forward": functools.partial(plain, False)}
    names = list(makers)
    references = ("the released formulation", "the same, sentences read once", "CLIP's blocks without prompts")
    pairs = [
        (f"{what} / {reference}", names[first], names[first + i])
        for first, what in ((0, "training step"), (4, "forward"))
        for i, reference in enumerate(references, 1)
    ]
    shape = f"CLIP ViT-L/14, batch {BATCH}, {len(SENTENCES[SET])} sentences, 50 prompts in 24 layers"
    bench.run("promptpar", shape, makers, pairs, rounds=3)


if __name__ == "__main__":
    main()
