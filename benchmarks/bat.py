"""BAT's time for a frame and for a training step, compared with the two passes of the paper's formulas.

The reference runs the network as the released code does (section 3.2 of the method, line by line): each stream
separately, attention by two matrix products and a softmax, the norms recomputed for the adapters, the template embedded
with every frame. Ours takes both streams as one batch, calls PyTorch's fused attention, computes each norm once and
caches the template's tokens. Both are checked to give the same box before anything is timed.

A frame is one forward pass on one search crop; cropping and reading files are the same for both. In float32 the frozen
layers' matrix products are more than four fifths of it, and neither form avoids any of them; bfloat16 halves their time
on processors that support it.
"""

from __future__ import annotations

import functools

import bench
import torch
from bench import Step
from torch import Tensor, nn

from companion.io.files import read_json, write_json
from companion.models import bat
from companion.toy.encoders import tracker as pocket_tracker

POCKET_FRAMES = 20  # one takes a few milliseconds


def inputs(tracker: bat.OSTrack) -> tuple[Tensor, Tensor]:
    """A template and a search crop of six channels."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 6, side, side, generator=generator) for side in (tracker.template, tracker.search))


def build(name: str) -> bat.BAT:
    torch.manual_seed(0)
    builder = pocket_tracker.build if name == "pocket_ostrack" else bat.foundation
    return bat.BAT(builder("random")).eval()


# --- the reference ----------------------------------------------------------------------------------------------------


def attention(attn: nn.Module, h: Tensor) -> Tensor:
    q, k, v = attn.qkv(h).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = ((q @ k.transpose(-2, -1)) * attn.scale).softmax(-1)
    return attn.proj((weights @ v).transpose(1, 2).flatten(2))


def two_passes(model: bat.BAT, template: Tensor, search: Tensor) -> bat.Prediction:
    """The output of `model(template, search)`, computed as in the released code."""
    tracker, embedded = model.tracker, []
    for z, x in zip(template.chunk(2, 1), search.chunk(2, 1), strict=True):
        embedded.append(torch.cat([tracker.embed_template(z), tracker.embed_search(x)], 1))
    x, xi = embedded
    for block, adapters in zip(tracker.vit.blocks, model.adapters, strict=True):
        drop1, drop2 = block.drop_path1, block.drop_path2
        pass1, pass2 = adapters["attention"], adapters["mlp"]
        before = x
        x = x + drop1(attention(block.attn, block.norm1(x))) + drop1(pass1(block.norm1(xi)))
        xi = xi + drop1(attention(block.attn, block.norm1(xi))) + drop1(pass1(block.norm1(before)))
        before = x
        x = x + drop2(block.mlp(block.norm2(x))) + drop2(pass2(block.norm2(xi)))
        xi = xi + drop2(block.mlp(block.norm2(xi))) + drop2(pass2(block.norm2(before)))
    return tracker.forward_head(tracker.vit.norm(x) + tracker.vit.norm(xi))


# --- what is timed ----------------------------------------------------------------------------------------------------


def frame(name: str, ours: bool, half: bool = False) -> Step:
    """A frame of the ViT-B/16, or twenty of the toy tracker."""
    model = build(name)
    template, search = inputs(model.tracker)

    @torch.inference_mode()
    def embedded() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model.embed_template(template)

    tokens = embedded()

    @torch.inference_mode()
    def step() -> None:
        for _ in range(POCKET_FRAMES if name == "pocket_ostrack" else 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                model.locate(tokens, search) if ours else two_passes(model, template, search)

    return step


def training(ours: bool) -> Step:
    """A step of the adapters on one pair at paper scale, with the released dropout and drop path."""
    model = build("ostrack_b256").train()
    crops, boxes = inputs(model.tracker), torch.tensor([[0.3, 0.35, 0.25, 0.2]])
    optimizer = torch.optim.AdamW(model.trained().values(), lr=4e-4)

    def step() -> None:
        prediction = model(*crops) if ours else two_passes(model, *crops)
        bat.losses(prediction, boxes)["loss"].backward()
        nn.utils.clip_grad_norm_(model.trained().values(), 0.1)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain() -> Step:
    """OSTrack on both streams, forward and backward to its tokens: a lower bound of any exact training step."""
    tracker = build("ostrack_b256").tracker
    template, search = inputs(tracker)
    with torch.no_grad():
        z, x = (torch.cat(images.chunk(2, 1)) for images in (template, search))
        tokens = torch.cat([tracker.embed_template(z), tracker.embed_search(x)], 1)
    tokens.requires_grad_()
    boxes = torch.tensor([[0.3, 0.35, 0.25, 0.2]])

    def step() -> None:
        first, second = tracker.vit.norm(tracker.vit.blocks(tokens)).chunk(2)
        bat.losses(tracker.forward_head(first + second), boxes)["loss"].backward()
        tokens.grad = None

    return step


@torch.inference_mode()
def check(name: str) -> None:
    """Raises when the two forms differ by more than float32 rounding."""
    model = build(name)
    crops = inputs(model.tracker)
    for a, b in zip(model(*crops), two_passes(model, *crops), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def main() -> None:
    for name in ("ostrack_b256", "pocket_ostrack"):
        check(name)
    big, pocket = (functools.partial(frame, name) for name in ("ostrack_b256", "pocket_ostrack"))
    makers = {
        "BAT, ViT-B/16 float32, frame": functools.partial(big, True),
        "two passes, ViT-B/16 float32, frame": functools.partial(big, False),
        "BAT, ViT-B/16 bfloat16, frame": functools.partial(big, True, True),
        "two passes, ViT-B/16 bfloat16, frame": functools.partial(big, False, True),
        f"BAT, pocket float32, {POCKET_FRAMES} frames": functools.partial(pocket, True),
        f"two passes, pocket float32, {POCKET_FRAMES} frames": functools.partial(pocket, False),
        "BAT, training step": functools.partial(training, True),
        "two passes, training step": functools.partial(training, False),
        "OSTrack on two streams, forward and back": plain,
    }
    full, full_two, half, half_two, small, small_two, step, step_two, least = makers
    frames = {
        "frame, float32 / two passes": (full, full_two),
        "frame, bfloat16 / two passes in float32, as released": (half, full_two),
        "frame, bfloat16 / two passes in bfloat16": (half, half_two),
        "pocket frame, float32 / two passes": (small, small_two),
    }
    steps = {
        "training step / two passes": (step, step_two),
        "training step / OSTrack on two streams, forward and back": (step, least),
    }
    bench.run(
        "bat",
        "ViT-B/16, crops of 128 and 256 pixels, one pair, width 8",
        makers,
        [(label, *pair) for label, pair in (frames | steps).items()],
    )
    path = bench.RESULTS / "bat.json"
    facts = read_json(path)
    for row in facts["rows"]:
        if row["what"] in frames:
            count = POCKET_FRAMES if row["what"].startswith("pocket") else 1
            row |= {"fps": round(count / row["seconds"], 3), "fps_ratio": round(1 / row["time_ratio"], 2)}
            print(f"{row['what']}: {row['fps_ratio']} x the frames per second")
    write_json(path, facts)


if __name__ == "__main__":
    main()
