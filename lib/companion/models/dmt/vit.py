"""The plain ViT of DMT's teachers (MAE, MoCo v3, iBOT, DINO) and students, and the decoder of masked autoencoders.

Shapes: B images, L patches (V of them visible), N = 1 + L tokens, the [CLS] token first, of dimension D.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import BadParameter, check_choice
from ...ops.recorded import Recorded
from ..layers import mae, state_dicts
from ..layers.pos_embed import resize_pos_embed, sincos_table

POSITIONS = ("mae", "mocov3", "learned")

# students [paper: tiny, small, base]; with the usual widths. Pocket: ours, for a CPU (section 14)
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 192, "depth": 12, "heads": 3},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "pocket": {"image": 32, "patch": 8, "width": 32, "depth": 2, "heads": 4},
    "pocket teacher": {"image": 32, "patch": 8, "width": 48, "depth": 2, "heads": 4},
}
# G2SD's decoders for those widths [anc]: width, depth, heads
DECODERS = {"tiny": (128, 4, 4), "small": (256, 4, 8), "base": (512, 4, 16), "pocket": (32, 1, 4)}


class ViT(Recorded, nn.Module):
    """The plain ViT that MAE, MoCo v3, iBOT and DINO share, and the students: pre-norm, eps 1e-6, a [CLS] token [anc].

    Tensors are named as in all four official codes and in timm.

    Args:
        image, patch: sides in pixels; `image` fixes the position embedding, other sizes resize it.
        width, depth, heads, mlp_ratio: D, blocks, heads, and the MLP's width over D.
        positions: "mae" or "mocov3", fixed sines and cosines; "learned", trained, as iBOT's and DINO's.
        masked: has iBOT's `masked_embed`, which replaces masked patches.
        last_heads: heads of the last block, where a relation loss needs as many as the teacher has [anc: TinyMIM].
        drop_path: largest probability of stochastic depth, reached in the last block.

    Raises `BadParameter`: sizes that do not fit each other, or unknown `positions`.
    """

    def __init__(
        self,
        image: int = 224,
        patch: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        *,
        positions: str = "mae",
        masked: bool = False,
        last_heads: int | None = None,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if image % patch:
            raise BadParameter("image", image, f"a multiple of the patch, {patch}")
        for count in (heads, last_heads or heads):
            if width % count:
                raise BadParameter("heads", count, f"a divisor of the width, {width}")
        check_choice("positions", positions, POSITIONS)
        self.image, self.patch, self.width, self.positions = image, patch, width, positions
        self.grid, self.checkpointing = image // patch, False
        self.patch_embed = PatchEmbed(None, patch, 3, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        fixed = positions != "learned"
        table = sincos_table(width, self.grid, positions) if fixed else torch.empty(1, 1 + self.grid**2, width)
        self.pos_embed = nn.Parameter(table, requires_grad=not fixed)
        self.masked_embed = nn.Parameter(torch.zeros(1, width)) if masked else None
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(
                width,
                (last_heads or heads) if i == depth - 1 else heads,
                mlp_ratio,
                qkv_bias=True,
                norm_layer=norm,
                drop_path=drop_path * i / max(depth - 1, 1),
            )
            for i in range(depth)
        )
        self.norm = norm(width)
        self.apply(initialise)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.normal_(self.cls_token, std=0.02)
        if not fixed:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @property
    def patches(self) -> int:
        """L."""
        return self.grid**2

    @property
    def heads(self) -> int:
        """Heads of the last block."""
        return self.blocks[-1].attn.num_heads

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass, which needs less memory and more time."""
        self.checkpointing = enable

    def embed(self, images: Tensor, keep: Tensor | None = None, masked: Tensor | None = None) -> Tensor:
        """The input of the first block: (B, N, D), positions added.

        Args:
            images: (B, 3, H, W), sides multiples of the patch.
            keep: (B, V) the visible patches; the others are dropped, as MAE does. Tokens come in this order.
            masked: (B, L) bool; True: replaced by `masked_embed` before the position is added, as iBOT does.
        """
        if images.ndim != 4 or images.shape[1] != 3 or any(n % self.patch or not n for n in images.shape[2:]):
            raise BadParameter("images", tuple(images.shape), f"(B, 3, H, W), H and W multiples of {self.patch}")
        x = self.patch_embed(images)
        if masked is not None:
            if self.masked_embed is None:
                raise BadParameter(
                    "masked", "given", "only for a ViT(masked=True), which has a token for masked patches"
                )
            x = torch.where(masked.flatten(1)[..., None], self.masked_embed.to(x.dtype), x)
        # the offset of 0.1 is iBOT's and DINO's
        table = resize_pos_embed(self.pos_embed, [n // self.patch for n in images.shape[2:]], offset=0.1)
        x = x + table[:, 1:]
        if keep is not None:
            x = x.take_along_dim(keep[..., None], 1)
        return torch.cat([(self.cls_token + table[:, :1]).expand(len(x), -1, -1).to(x.dtype), x], 1)

    def hidden(
        self, images: Tensor, layers: Sequence[int] = (-1,), keep: Tensor | None = None, masked: Tensor | None = None
    ) -> list[Tensor]:
        """Outputs (B, N, D) of some blocks, before the final norm; -1 is the last. Blocks after these are not run."""
        depth = len(self.blocks)
        if any(not -depth <= layer < depth for layer in layers):
            raise BadParameter("layers", tuple(layers), f"{-depth} to {depth - 1}")
        wanted = [layer % depth for layer in layers]
        x, found = self.embed(images, keep, masked), {}
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x)
            if i in wanted:
                found[i] = x
        return [found[i] for i in wanted]

    def forward_features(self, images: Tensor, keep: Tensor | None = None, masked: Tensor | None = None) -> Tensor:
        """Tokens (B, N, D) after the final norm; see `embed`."""
        return self.norm(self.hidden(images, keep=keep, masked=masked)[0])

    def forward(self, images: Tensor, keep: Tensor | None = None, masked: Tensor | None = None) -> Tensor:
        """As `forward_features`: there is no classifier."""
        return self.forward_features(images, keep, masked)

    def features(self, images: Tensor) -> Tensor:
        """The input of a linear probe, (B, 2 D): the [CLS] token and the mean patch token, after the norm [house]."""
        x = self(images)
        return torch.cat([x[:, 0], x[:, 1:].mean(1)], 1)

    def qkv(self, x: Tensor, layer: int = -1) -> Tensor:
        """Queries, keys and values (3, B, heads, N, d) of a block, from its input (B, N, D)."""
        block = self.blocks[layer]
        return block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)

    @torch.no_grad()
    def attention(self, images: Tensor, layer: int = -1) -> Tensor:
        """Attention of the [CLS] token to the patches in a block: (B, heads, L); its attention to itself is left
        out."""
        layer %= len(self.blocks)
        x = self.hidden(images, (layer - 1,))[0] if layer else self.embed(images)
        q, k, _ = self.qkv(x, layer)
        return (q[:, :, :1] @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)[:, :, 0, 1:]

    @classmethod
    def from_official(
        cls,
        state: Mapping[str, Tensor],
        heads: int | None = None,
        what: str = "a ViT teacher",
        *,
        last_heads: int | None = None,
    ) -> ViT:
        """The encoder in a released state dict of MAE, MoCo v3, iBOT, DINO or timm, in eval mode (section 3.2).

        Prefixes are removed (`module.base_encoder.`, `backbone.`, `module.backbone.`); heads, momentum encoders and
        decoders are ignored. All sizes are read from the tensors; a position embedding that equals MAE's or MoCo
        v3's is fixed, any other is learned. The inverse is `to_official`.

        Args:
            heads: not in the tensors. None: one for 64 channels, as ViT-T, -S and -B of all but MoCo v3's ViT-S, which
                has 12.
            last_heads: of the last block, where they differ.

        Raises `BadCheckpoint`: names that are missing, unknown or of another shape.
        """
        state = encoder_state(state)
        needed = {"patch_embed.proj.weight", "pos_embed", "cls_token", "blocks.0.mlp.fc1.weight"}
        state_dicts.check_names(state, needed, what)
        table, (width, _, _, patch) = state["pos_embed"], state["patch_embed.proj.weight"].shape
        side, kind = math.isqrt(table.shape[1] - 1), "learned"
        if side**2 + 1 == table.shape[1] and not width % 4:
            for fixed in ("mae", "mocov3"):
                if torch.allclose(sincos_table(width, side, fixed).cpu(), table.float().cpu(), atol=1e-4):
                    kind = fixed
        model = cls(
            side * patch,
            patch,
            width,
            state_dicts.depth(state, "blocks."),
            heads or max(width // 64, 1),
            len(state["blocks.0.mlp.fc1.weight"]) / width,
            positions=kind,
            masked="masked_embed" in state,
            last_heads=last_heads,
        )
        state_dicts.load_official(model, state, {name: name for name in model.state_dict()}, what)
        return model.eval()

    def to_official(self, prefix: str = "") -> dict[str, Tensor]:
        """The state dict under the official names, after a prefix such as "module.base_encoder."."""
        return {prefix + name: value.clone() for name, value in self.state_dict().items()}


def encoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors of a released state dict, without prefix; other tensors are left out."""
    for prefix in ("module.", "base_encoder.", "backbone."):
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        state = own or state
    others = ("head.", "decoder_", "momentum_encoder.", "predictor.", "fc_norm.")
    # MAE's mask token is the decoder's; DINO's and iBOT's position embeddings are the encoder's
    return {name: value for name, value in state.items() if not name.startswith(others) and name != "mask_token"}


def build(size: str = "small", **options: Any) -> ViT:
    """A random ViT (torch's current seed) of one of `SIZES`; `options` as in `ViT`."""
    check_choice("size", size, SIZES)
    return ViT(**{**SIZES[size], **options})


def initialise(module: nn.Module) -> None:
    """MAE's initial weights [anc]: linear layers Xavier-uniform, biases 0; norms stay at 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# --- masked autoencoders ----------------------------------------------------------------------------------------------


def visible(patches: int, ratio: float) -> int:
    """The number of visible patches when the share `ratio` is masked: L (1 - ratio) rounded down, as in MAE."""
    if not 0 <= ratio < 1:
        raise BadParameter("mask_ratio", ratio, "0 or more, less than 1")
    count = int(patches * (1 - ratio))
    if not count:
        raise BadParameter("mask_ratio", ratio, f"one that leaves a patch of {patches}")
    return count


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """The [CLS] token and the patches `index` (B, n) of tokens (B, 1 + L, D): (B, 1 + n, D)."""
    return torch.cat([tokens[:, :1], tokens[:, 1:].take_along_dim(index[..., None], 1)], 1)


class Decoder(mae.Decoder):
    """MAE's and G2SD's decoder [anc], with MAE's initial weights."""

    def __init__(self, inputs: int, width: int, depth: int, heads: int, side: int, positions: str = "mae"):
        super().__init__(inputs, width, depth, heads, side, positions)
        self.apply(initialise)
        nn.init.normal_(self.mask_token, std=0.02)
