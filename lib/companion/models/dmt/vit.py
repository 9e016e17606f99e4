"""The plain ViT of DMT's teachers (MAE, MoCo v3, iBOT, DINO) and students: timm's, with visible and masked patches.

Shapes: B images, L patches (V of them visible), N = 1 + L tokens, the [CLS] token first, of dimension D.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import InterpolationMode, v2

from ...data.images import as_rgb
from ...errors import Count, Positive, check_choice, check_parts, typed
from ...io.config import configure
from ..layers.attend import attention_map, qkv
from ..layers.heads import vit_sizes
from ..layers.mae import initialise, initialise_stem, visible_tokens
from ..layers.pos_embed import sincos_table
from ..layers.predicting import Images, Names, Transform, named, outputs
from ..layers.state_dicts import OfficialModel, below

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of all released teachers
NORMALISE = v2.Normalize(list(MEAN), list(STD))
# students [paper: tiny, small, base]; with the usual widths. Pocket: ours, for a CPU (section 14)
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 192, "depth": 12, "heads": 3},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "pocket": {"image": 32, "patch": 8, "width": 32, "depth": 2, "heads": 4},
    "pocket teacher": {"image": 32, "patch": 8, "width": 48, "depth": 2, "heads": 4},
}


class ViT(VisionTransformer, OfficialModel):
    """timm's ViT with the position embeddings of MAE, MoCo v3, iBOT and DINO, and MAE's initial weights.

    Images to tokens after the final norm, also of visible patches alone (MAE), with masked patches (iBOT), and of
    images of another size (DINO, iBOT). Tensors are named as in all four official codes.

    Args:
        image, patch: sides in pixels; `image` fixes the position embedding, other sizes resize it.
        width, depth, heads, mlp_ratio: D, blocks, heads, and the MLP's width over D.
        positions: "mae" or "mocov3", fixed sines and cosines; "learned", trained, as iBOT's and DINO's.
        masked: has iBOT's `masked_embed`, which replaces masked patches.
    """

    def __init__(
        self,
        image: Count = 224,
        patch: Count = 16,
        width: Count = 768,
        depth: Count = 12,
        heads: Count = 12,
        mlp_ratio: Positive = 4.0,
        *,
        positions: str = "mae",
        masked: bool = False,
    ):
        configure(self, locals())
        check_parts("patch", image, patch)
        check_parts("heads", width, heads)
        any_size = partial(PatchEmbed, strict_img_size=False)
        sizes = {"embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": mlp_ratio, "num_classes": 0}
        super().__init__(
            image, patch, **sizes, global_pool="", pos_embed="none", weight_init="skip", embed_layer=any_size
        )
        self.width, self.patches, self.positions = width, self.patch_embed.num_patches, positions
        fixed = positions != "learned"
        table = sincos_table(width, image // patch, positions) if fixed else torch.empty(1, 1 + self.patches, width)
        self.pos_embed = nn.Parameter(table, requires_grad=not fixed)
        self.masked_embed = nn.Parameter(torch.zeros(1, width)) if masked else None
        self.apply(initialise)
        initialise_stem(self)
        if not fixed:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def hidden(
        self, images: Tensor, layers: Sequence[int] = (-1,), keep: Tensor | None = None, masked: Tensor | None = None
    ) -> list[Tensor]:
        """Outputs (B, N, D) of some blocks, before the final norm; -1 is the last. Blocks after these are not run.

        Args:
            images: (B, 3, H, W), sides multiples of the patch.
            keep, masked: (B, V) and (B, L), see `mae.visible_tokens`. Tokens come in the order of `keep`.
        """
        wanted = [range(len(self.blocks))[layer] for layer in layers]
        x, outputs = visible_tokens(self, images, keep, masked), {}  # (B, N, D)
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            recomputed = self.grad_checkpointing and self.training
            x = checkpoint(block, x, use_reentrant=False) if recomputed else block(x)
            if i in wanted:
                outputs[i] = x
        return [outputs[i] for i in wanted]

    def forward_features(self, images: Tensor, keep: Tensor | None = None, masked: Tensor | None = None) -> Tensor:
        """Tokens (B, N, D) after the final norm; see `hidden`."""
        return self.norm(self.hidden(images, keep=keep, masked=masked)[0])

    def forward(self, images: Tensor, keep: Tensor | None = None, masked: Tensor | None = None) -> Tensor:
        """As `forward_features`, or logits (B, C) when it has been given a classifier."""
        return self.forward_head(self.forward_features(images, keep, masked))

    def predict(self, images: Images, names: Names, transform: Transform = None) -> list[Any]:
        """Features (2 D,) of each image; of a classifier the probability of each class."""
        transform = transform or test_transform(self.patch_embed.img_size[0])
        if not self.num_classes:
            return list(outputs(self, images, transform, run=self.features))
        return named(outputs(self, images, transform).softmax(1), names)

    def features(self, images: Tensor) -> Tensor:
        """The input of a linear probe, (B, 2 D): the [CLS] token and the mean patch token, after the norm [house]."""
        x = self.forward_features(images)
        return torch.cat([x[:, 0], x[:, 1:].mean(1)], 1)

    @torch.no_grad()
    def attention(self, images: Tensor) -> Tensor:
        """Attention of the [CLS] token to the patches in the last block: (B, heads, L), without that to itself."""
        last = self.blocks[-1]
        x = last.norm1(self.blocks[:-1](visible_tokens(self, images)))  # (B, N, D)
        q, k, _ = qkv(last.attn, x)
        return attention_map(q[:, :, :1], k)[:, :, 0, 1:]

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], heads: int | None = None, what: str = "a ViT teacher") -> ViT:
        """The encoder in a released state dict of MAE, MoCo v3, iBOT, DINO or timm, in eval mode (section 3.2).

        Prefixes are removed (`module.base_encoder.`, `backbone.`, `module.backbone.`); heads, momentum encoders and
        decoders are ignored. All sizes are read from the tensors; a position embedding that equals MAE's or MoCo
        v3's is fixed, any other is learned. The inverse is `to_official`.

        Args:
            heads: not in the tensors. None: one for 64 channels, as ViT-T, -S and -B of all but MoCo v3's ViT-S, which
                has 12.

        Raises `BadCheckpoint`: names that are missing, unknown or of another shape.
        """
        state = encoder_state(state)
        sizes, table = vit_sizes(state, heads), state["pos_embed"].float().cpu()
        side, positions = math.isqrt(table.shape[1] - 1), "learned"
        for kind in ("mae", "mocov3"):
            known = sincos_table(table.shape[2], side, kind).cpu()
            if table.shape == known.shape and torch.allclose(known, table, atol=1e-4):
                positions = kind
        model = cls(*sizes.values(), positions=positions, masked="masked_embed" in state)
        return model.loaded(state, what)


def encoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors of a released state dict, without prefix; other tensors are left out."""
    for prefix in ("module.", "base_encoder.", "backbone."):
        state = below(state, prefix) or state
    others = ("head.", "decoder_", "momentum_encoder.", "predictor.", "fc_norm.")
    # MAE's mask token is the decoder's; DINO's and iBOT's position embeddings are the encoder's
    return {name: value for name, value in state.items() if not name.startswith(others) and name != "mask_token"}


def build(size: str = "small", **options: Any) -> ViT:
    """A random ViT (torch's current seed) of one of `SIZES`; `options` as in `ViT`."""
    check_choice("size", size, SIZES)
    return ViT(**{**SIZES[size], **options})


@typed
def test_transform(size: Count = 224) -> v2.Transform:
    """The centre of an image whose short side is size x 256 / 224, bicubic."""
    cubic = InterpolationMode.BICUBIC
    steps = [as_rgb, v2.Resize(round(size * 256 / 224), cubic, antialias=True), v2.CenterCrop(size), v2.PILToTensor()]
    steps += [v2.ToDtype(torch.float32, scale=True), NORMALISE]
    return configure(v2.Compose(steps), {"size": size}, test_transform)
