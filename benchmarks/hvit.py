"""H-ViT's patch level compared with timm's ViT-S of the same weights, and its region level with plain blocks.

The patch level, run once, is nearly all of a slide's cost: it should be as fast as timm's ViT, although it also resizes
position embeddings in each pass and crops patches out of regions. Training Local H-ViT runs its region level forward
and backward: the reference is the bare blocks on the same number of tokens.
"""

from __future__ import annotations

import bench
import torch
from bench import Step
from timm.models.vision_transformer import VisionTransformer

from companion.models import hvit
from companion.models.layers.pos_embed import resize_pos_embed

PATCHES, REGIONS = 16, 7  # patches of one region of 1024 px; regions of 2048 px of a slide


def level() -> hvit.PatchEncoder:
    """The patch level at full size, random weights."""
    torch.manual_seed(0)
    return hvit.PatchEncoder().eval()


def region() -> torch.Tensor:
    return torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(1))


def timms() -> VisionTransformer:
    """timm's ViT-S/16 at 256 px, with the same weights: its position embedding resized beforehand."""
    encoder = level()
    vit = VisionTransformer(img_size=256, embed_dim=384, depth=12, num_heads=6, num_classes=0).eval()
    positions = resize_pos_embed(encoder.pos_embed, (16, 16)).detach()
    vit.load_state_dict(encoder.state_dict() | {"pos_embed": positions})
    return vit


def pieces() -> torch.Tensor:
    """The region's patches (16, 3, 256, 256), cropped beforehand."""
    cut = region()[0].unfold(1, 256, 256).unfold(2, 256, 256)
    return cut.permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous()


@torch.inference_mode()
def ours() -> Step:
    model, x = hvit.HViT(hvit.SlideTransformer(), hvit.RegionEncoder(4), level()), region()
    return torch.inference_mode()(lambda: model.embed_patches(x))


@torch.inference_mode()
def theirs() -> Step:
    vit, x = timms(), pieces()
    return torch.inference_mode()(lambda: vit(x))


def local_step() -> Step:
    """A training step of Local H-ViT on a slide's stored patch embeddings."""
    torch.manual_seed(0)
    model = hvit.build("paper", "local", "regression", levels=("region", "slide")).train()
    x, grade = torch.randn(1, REGIONS, 64, 384), torch.tensor([3])
    optimizer = torch.optim.Adam(model.trained().values(), lr=2e-4, weight_decay=1e-5)

    def step() -> None:
        hvit.loss("regression", model(x), grade).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def blocks_step() -> Step:
    """The region level's blocks alone, on the same number of tokens, forward and backward, with the same optimiser."""
    torch.manual_seed(0)
    blocks = hvit.RegionEncoder(8).blocks.train()
    x = torch.randn(REGIONS, 65, 192)
    optimizer = torch.optim.Adam(blocks.parameters(), lr=2e-4, weight_decay=1e-5)

    def step() -> None:
        z = x
        for block in blocks:
            z = block(z)
        z.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.inference_mode()
def check() -> None:
    """Raises when the two patch levels do not give the same embeddings."""
    model = hvit.HViT(hvit.SlideTransformer(), hvit.RegionEncoder(4), level())
    torch.testing.assert_close(model.embed_patches(region())[0], timms()(pieces()), rtol=1e-4, atol=1e-4)


def main() -> None:
    check()
    makers = {
        "patch level, a region of 1024 px": ours,
        "timm's ViT-S/16, its 16 patches": theirs,
        "Local H-ViT, training step on stored features": local_step,
        "the region level's blocks, forward and back": blocks_step,
    }
    patch, timm, local, blocks = makers
    bench.run(
        "hvit",
        f"ViT-S/16 at 256 px, {PATCHES} patches; region level of 2048 px, {REGIONS} regions a slide",
        makers,
        [
            ("patch level / timm's own ViT-S", patch, timm),
            ("training step of Local / the region level's blocks alone", local, blocks),
        ],
        rounds=5,
    )


if __name__ == "__main__":
    main()
