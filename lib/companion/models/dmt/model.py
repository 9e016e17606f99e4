"""DMT: comprehensive distillation with multiple self-supervised teachers (Liu et al., ICASSP 2024). A RECONSTRUCTION.

Several frozen ViTs that learned without labels, each in another way, teach one student together, without labels too.

    x (B, 3, S, S) --each frozen teacher k-->  y_k (B, 1 + L, D_k)  --norm-->  targets t_k
    a part of x's patches, V --student-->      z   (B, 1 + |V|, D)
    z --adapter A_k-->      compared with t_k on V                        token loss
    z --decoder, head k-->  p_k (B, 1 + L, D_k), compared with t_k        feature-map loss
    only the student is kept

Of the paper only the abstract and a paragraph of the introduction could be read, and there is no public code: WHAT
IS DISTILLED INTO WHAT, AND BY WHICH LOSS, IS OUR CHOICE. It follows ancestors whose code can be read, G2SD (decoder,
smooth L1 on normalised features), TinyMIM (relations) and MAE (masking), and the abstract of CoMAD (views, gate). Each
choice is one named argument and says where it is from:

    [paper]  the abstract or the first paragraph of the introduction      [anc]    an ancestor's published code
    [2nd]    second-hand, an abstract of a later paper                    [house]  us

Shapes: B pictures, L patches (V of them visible to the student), K teachers, D a width, N = 1 + L tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import BadCheckpoint, BadParameter
from ..layers.clip_prompting import load_official

POSITIONS = ("mae", "mocov3", "learned")
VIEWS = ("full", "same", "lighter")
NORMS = ("ln", "channel", "none")
STATISTICS = ("batch", "running")
FUSIONS = ("separate", "mean", "gate")
REGIONS = ("all", "removed")

# students [paper: tiny, small, base]; their widths are the field's. Pocket: ours, for a CPU (section 14)
SIZES = {
    "tiny": {"width": 192, "depth": 12, "heads": 3},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "pocket": {"image": 32, "patch": 8, "width": 32, "depth": 2, "heads": 4},
    "pocket teacher": {"image": 32, "patch": 8, "width": 48, "depth": 2, "heads": 4},
}
# G2SD's decoders for those widths [anc]: width, depth, heads
DECODERS = {"tiny": (128, 4, 4), "small": (256, 4, 8), "base": (512, 4, 16), "pocket": (32, 1, 4)}


# --- one ViT for students and teachers --------------------------------------------------------------------------------


def position_table(width: int, side: int, kind: str = "mae") -> Tensor:
    """The fixed sines and cosines of a grid (1, 1 + side², width), zeros for the class token (section 3.2).

    "mae": the first half of the channels codes the column, the second the row. "mocov3": the two halves exchanged.
    Each half is [sin(p w), cos(p w)] with w_i = 10000^(-i / (width / 4)).
    """
    if width % 4:
        raise BadParameter("width", width, "a multiple of 4, for a table of sines and cosines")
    steps = torch.arange(width // 4, dtype=torch.float64) / (width // 4)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * 10000.0**-steps
    axis = torch.cat([angles.sin(), angles.cos()], 1)  # (side, width / 2)
    row, column = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    halves = [column, row] if kind == "mae" else [row, column]
    return F.pad(torch.cat(halves, 2).flatten(0, 1).float(), (0, 0, 1, 0))[None]


def resize_positions(table: Tensor, grid: Sequence[int]) -> Tensor:
    """A table (1, 1 + s s, D) for another grid (h, w), as iBOT and DINO resize theirs: bicubic, scale (h + 0.1) / s."""
    side = math.isqrt(table.shape[1] - 1)
    if tuple(grid) == (side, side):
        return table
    square = table[:, 1:].mT.unflatten(2, (side, side))
    scale = tuple((n + 0.1) / side for n in grid)  # the 0.1 is theirs: without it a side may be rounded down
    resized = F.interpolate(square, scale_factor=scale, mode="bicubic")
    return torch.cat([table[:, :1], resized.flatten(2).mT], 1)


class ViT(nn.Module):
    """The plain ViT that MAE, MoCo v3, iBOT and DINO share, and the students: pre-norm, eps 1e-6, a class token [anc].

    Tensors are named as in all four official codes and in timm.

    Args:
        image, patch: sides in pixels; `image` fixes the position table, other sizes resize it.
        width, depth, heads, mlp_ratio: D, blocks, heads, and the MLP's width over D.
        positions: "mae" or "mocov3", fixed sines and cosines; "learned", trained, as iBOT's and DINO's.
        masked: has iBOT's `masked_embed`, which stands in for hidden patches.
        last_heads: heads of the last block, where a relation loss wants as many as the teacher has [anc: TinyMIM].
        drop_path: largest rate of stochastic depth, reached in the last block.

    Raises:
        BadParameter: sizes that do not fit each other, or an unknown table.
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
        if positions not in POSITIONS:
            raise BadParameter("positions", positions, POSITIONS)
        self.image, self.patch, self.width, self.positions = image, patch, width, positions
        self.grid = image // patch
        self.patch_embed = PatchEmbed(None, patch, 3, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        fixed = positions != "learned"
        table = position_table(width, self.grid, positions) if fixed else torch.empty(1, 1 + self.grid**2, width)
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
        self.apply(_initialise)
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

    def embed(self, images: Tensor, keep: Tensor | None = None, masked: Tensor | None = None) -> Tensor:
        """What enters the first block: (B, N, D), the class token first, positions added.

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
                raise BadParameter("masked", "given", "only for a ViT(masked=True), which has the token that stands in")
            x = torch.where(masked.flatten(1)[..., None], self.masked_embed.to(x.dtype), x)
        table = resize_positions(self.pos_embed, [n // self.patch for n in images.shape[2:]])
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
            x = block(x)
            if i in wanted:
                found[i] = x
        return [found[i] for i in wanted]

    def forward(self, images: Tensor, keep: Tensor | None = None, masked: Tensor | None = None) -> Tensor:
        """Tokens (B, N, D) after the final norm, the class token first; see `embed`."""
        return self.norm(self.hidden(images, keep=keep, masked=masked)[0])

    def features(self, images: Tensor) -> Tensor:
        """What a probe reads, (B, 2 D): the class token and the mean patch token, after the final norm [house]."""
        x = self(images)
        return torch.cat([x[:, 0], x[:, 1:].mean(1)], 1)

    def qkv(self, x: Tensor, layer: int = -1) -> Tensor:
        """Queries, keys and values (3, B, heads, N, d) of a block, of what enters it (B, N, D)."""
        block = self.blocks[layer]
        return block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)

    @torch.no_grad()
    def attention(self, images: Tensor, layer: int = -1) -> Tensor:
        """Where the class token looks in a block: (B, heads, L), shares of a row that also has the class token."""
        layer %= len(self.blocks)
        x = self.hidden(images, (layer - 1,))[0] if layer else self.embed(images)
        q, k, _ = self.qkv(x, layer)
        return (q[:, :, :1] @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)[:, :, 0, 1:]

    # --- released checkpoints ---

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], heads: int | None = None, what: str = "a ViT teacher") -> ViT:
        """The encoder in a released state dict of MAE, MoCo v3, iBOT, DINO or timm, in eval mode (section 3.2).

        Prefixes are taken off (`module.base_encoder.`, `backbone.`, `module.backbone.`); heads, momentum encoders and
        decoders are passed over. All sizes are read from the tensors; a table that equals MAE's or MoCo v3's is fixed,
        any other is learned. The inverse is `to_official`.

        Args:
            heads: tensors do not say them. None: one for 64 channels, as ViT-T, -S and -B of all but MoCo v3's ViT-S,
                which has 12.

        Raises:
            BadCheckpoint: names that are missing, unknown or of another shape.
        """
        state = encoder_state(state)
        needed = {"patch_embed.proj.weight", "pos_embed", "cls_token", "blocks.0.mlp.fc1.weight"}
        if missing := needed - state.keys():
            raise BadCheckpoint(what, missing)
        table, (width, _, _, patch) = state["pos_embed"], state["patch_embed.proj.weight"].shape
        side = math.isqrt(table.shape[1] - 1)
        kind = "learned"
        if side**2 + 1 == table.shape[1] and not width % 4:
            for fixed in ("mae", "mocov3"):
                if torch.allclose(position_table(width, side, fixed), table.float().cpu(), atol=1e-4):
                    kind = fixed
        model = cls(
            side * patch,
            patch,
            width,
            1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
            heads or max(width // 64, 1),
            len(state["blocks.0.mlp.fc1.weight"]) / width,
            positions=kind,
            masked="masked_embed" in state,
        )
        load_official(model, state, {name: name for name in model.state_dict()}, what)
        return model.eval()

    def to_official(self, prefix: str = "") -> dict[str, Tensor]:
        """The state dict under the official names, after a prefix such as "module.base_encoder."."""
        return {prefix + name: value.clone() for name, value in self.state_dict().items()}


def encoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors of a released state dict, without prefix; what is no encoder's is left out."""
    for prefix in ("module.", "base_encoder.", "backbone."):
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        state = own or state
    others = ("head.", "decoder_", "momentum_encoder.", "predictor.", "fc_norm.")
    # MAE's mask token is the decoder's; DINO's and iBOT's position tables are the encoder's
    return {name: value for name, value in state.items() if not name.startswith(others) and name != "mask_token"}


def build(size: str = "small", **options: object) -> ViT:
    """A random ViT (torch's current seed) of one of `SIZES`; `options` as in `ViT`."""
    if size not in SIZES:
        raise BadParameter("size", size, tuple(SIZES))
    return ViT(**{**SIZES[size], **options})


def _initialise(module: nn.Module) -> None:
    """MAE's start [anc]: linear layers Xavier-uniform, biases 0, norms 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# --- what is hidden ---------------------------------------------------------------------------------------------------


def visible(patches: int, ratio: float) -> int:
    """How many patches stay when the share `ratio` is hidden: the whole part of L (1 - ratio), as in MAE."""
    if not 0 <= ratio < 1:
        raise BadParameter("mask_ratio", ratio, "0 or more, less than 1")
    count = int(patches * (1 - ratio))
    if not count:
        raise BadParameter("mask_ratio", ratio, f"one that leaves a patch of {patches}")
    return count


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """The class token and the patches `index` (B, n) of tokens (B, 1 + L, D): (B, 1 + n, D)."""
    return torch.cat([tokens[:, :1], tokens[:, 1:].take_along_dim(index[..., None], 1)], 1)


class Decoder(nn.Module):
    """From visible tokens to all positions: a linear layer, mask tokens, positions, blocks, norm [anc: MAE, G2SD]."""

    def __init__(self, inputs: int, width: int, depth: int, heads: int, side: int, positions: str = "mae"):
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(position_table(width, side, positions), requires_grad=False)
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(Block(width, heads, 4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.norm = norm(width)
        self.apply(_initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    def hidden(self, latent: Tensor, keep: Tensor, depth: int | None = None) -> Tensor:
        """Tokens (B, 1 + L, width) in raster order, before the norm, after the first `depth` blocks (None: all).

        Args:
            latent: (B, 1 + V, D), the class token first.
            keep: (B, V) which patches they are.
        """
        x = self.embed(latent)
        full = self.mask_token.to(x.dtype).repeat(len(x), self.pos_embed.shape[1] - 1, 1)
        full = full.scatter(1, keep[..., None].expand(-1, -1, x.shape[-1]), x[:, 1:])
        x = torch.cat([x[:, :1], full], 1) + self.pos_embed
        for block in self.blocks[:depth]:
            x = block(x)
        return x

    def forward(self, latent: Tensor, keep: Tensor) -> Tensor:
        """As `hidden`, after the norm."""
        return self.norm(self.hidden(latent, keep))


# --- teachers and targets ---------------------------------------------------------------------------------------------


class Taught(NamedTuple):
    """What K teachers say of a batch, without autograd."""

    tokens: tuple[Tensor, ...]  # each (B, 1 + L, D_k) in raster order; under a narrower view (B, 1 + n_k, D_k)
    qkv: tuple[Tensor, ...] | None = None  # each (3, B, heads_k, N, d_k) of the same block, for the relation loss


class Teachers(nn.Module):
    """K frozen ViTs that are asked once a batch.

    Args:
        models: the teachers by name [paper: three self-supervised ViT-Base; 2nd: MAE, MoCo v3, iBOT]. They are frozen.
        layer: the block whose output is the target, before the final norm [house: the last].
        view: what a teacher sees [house: the whole picture, "full"]. "same": the student's visible patches [anc:
            G2SD]. "lighter": these and more, a share of its own for each [2nd: CoMAD].
        shares: for "lighter": the share of visible patches of each teacher; None: steps from the student's to 1.
        sees: by name, what turns the student's pictures into this teacher's, where they differ (see `grey`).
    """

    def __init__(
        self,
        models: Mapping[str, ViT],
        *,
        layer: int = -1,
        view: str = "full",
        shares: Sequence[float] | None = None,
        sees: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ):
        super().__init__()
        if not models:
            raise BadParameter("teachers", dict(models), "one or more")
        if view not in VIEWS:
            raise BadParameter("teacher_view", view, VIEWS)
        if unknown := set(sees or ()) - set(models):
            raise BadParameter("sees", sorted(unknown), tuple(models))
        if shares is not None and (len(shares) != len(models) or not all(0 < s <= 1 for s in shares)):
            raise BadParameter("shares", shares, f"{len(models)} numbers, above 0 and up to 1")
        for name, model in models.items():
            if not -len(model.blocks) <= layer < len(model.blocks):
                raise BadParameter("teacher_layer", layer, f"a block of {name}, which has {len(model.blocks)}")
        if len({model.patches for model in models.values()}) > 1:
            raise BadParameter("teachers", {n: m.patches for n, m in models.items()}, "the same grid of patches in all")
        self.models = nn.ModuleDict(dict(models)).requires_grad_(False).eval()
        self.layer, self.view, self.sees = layer, view, dict(sees or {})
        self.shares = None if shares is None else tuple(shares)

    def train(self, mode: bool = True) -> Teachers:
        """They stay in eval mode, whatever the student is in."""
        return super().train(False)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.models)

    @property
    def widths(self) -> tuple[int, ...]:
        """D_k."""
        return tuple(model.width for model in self.models.values())

    @property
    def heads(self) -> tuple[int, ...]:
        """Heads of the block that is the target."""
        return tuple(model.blocks[self.layer].attn.num_heads for model in self.models.values())

    def counts(self, patches: int, student: int) -> tuple[int, ...]:
        """How many patches each teacher sees, when the student sees `student` of `patches`."""
        k = len(self.models)
        if self.view == "full":
            return (patches,) * k
        if self.view == "same":
            return (student,) * k
        shares = self.shares or [student / patches + (1 - student / patches) * (i + 1) / k for i in range(k)]
        return tuple(max(student, round(share * patches)) for share in shares)

    @torch.no_grad()
    def forward(
        self, images: Tensor, order: Tensor | None = None, student: int | None = None, relations: bool = False
    ) -> Taught:
        """What they say of pictures (B, 3, S, S).

        Args:
            order: (B, L) the patches, the student's visible ones first; only a narrower view needs it.
            student: how many of them are the student's.
            relations: queries, keys and values too.
        """
        if self.view != "full" and (order is None or student is None):
            raise BadParameter("order", None, f"the order of the patches, which teacher_view = {self.view!r} needs")
        tokens, all_qkv = [], []
        seen = (None,) * len(self.models) if self.view == "full" else self.counts(order.shape[1], student)
        for (name, model), count in zip(self.models.items(), seen, strict=True):
            picture = self.sees[name](images) if name in self.sees else images
            keep = None if count is None else order[:, :count]
            layer = self.layer % len(model.blocks)
            if relations:
                x = model.hidden(picture, (layer - 1,), keep)[0] if layer else model.embed(picture, keep)
                all_qkv.append(model.qkv(x, layer))
                tokens.append(model.blocks[layer](x))
            else:
                tokens.append(model.hidden(picture, (layer,), keep)[0])
        return Taught(tuple(tokens), tuple(all_qkv) if relations else None)


def grey(images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) without their colour: the weighted mean of the channels (ITU-R 601), three times."""
    weights = images.new_tensor([0.299, 0.587, 0.114])
    return torch.einsum("bchw,c->bhw", images, weights)[:, None].expand_as(images)


class TargetNorm(nn.Module):
    """A teacher's tokens (B, N, D_k) on a common scale.

    Args:
        width: D_k.
        kind: "ln": LayerNorm without affine over the channels, eps 1e-6 [anc: G2SD]. "channel": after it each channel
            to mean 0 and deviation 1 over the batch and its tokens [house, section 14.4]. "none": as they are.
        statistics: of "channel": those of the "batch", or "running" ones, a mean over batches, for large training runs.
        momentum: what a new batch counts in the running ones.
    """

    def __init__(self, width: int, kind: str = "channel", statistics: str = "batch", momentum: float = 0.01):
        super().__init__()
        for name, value, accepted in (("target_norm", kind, NORMS), ("statistics", statistics, STATISTICS)):
            if value not in accepted:
                raise BadParameter(name, value, accepted)
        self.kind, self.statistics, self.momentum = kind, statistics, momentum
        if kind == "channel" and statistics == "running":
            self.register_buffer("mean", torch.zeros(width))
            self.register_buffer("square", torch.ones(width))
            self.register_buffer("batches", torch.zeros(()))

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens.float()
        if self.kind == "none":
            return x
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        if self.kind == "ln":
            return x
        mean, square = x.mean((0, 1)), x.square().mean((0, 1))
        if self.statistics == "running":
            if self.training:
                # the first batches count equally, so that the start does not weigh for long
                self.batches += 1
                share = torch.clamp(1 / self.batches, min=self.momentum)
                self.mean.lerp_(mean, share)
                self.square.lerp_(square, share)
            mean, square = self.mean, self.square
        return (x - mean) / (square - mean.square()).clamp_min(1e-6).sqrt()


# --- losses -----------------------------------------------------------------------------------------------------------


def feature_loss(predicted: Tensor, target: Tensor, beta: float = 2.0, weight: Tensor | None = None) -> Tensor:
    """Smooth L1 [anc: G2SD], its mean over everything, or over the tokens with `weight` (B, N) above 0."""
    if weight is None:
        return F.smooth_l1_loss(predicted.float(), target, beta=beta)
    each = F.smooth_l1_loss(predicted.float(), target, beta=beta, reduction="none").mean(-1)
    return (each * weight).sum() / weight.sum()


def relation_maps(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Relations of queries with keys and of values with values: logits (B, heads, N, N), over the root of d."""
    q, k, v = qkv.float()
    return q @ k.mT / math.sqrt(q.shape[-1]), v @ v.mT / math.sqrt(v.shape[-1])


def relation_loss(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) of both relations [anc: TinyMIM]: summed over a row, mean over rows and heads.

    Args:
        student, teacher: (3, B, heads, N, d), as many heads and tokens in both.
    """
    pairs = zip(relation_maps(student), relation_maps(teacher), strict=True)
    both = [
        F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
        for s, t in pairs
    ]
    return both[0], both[1]


class Losses(NamedTuple):
    """The loss, and its parts by head (one for each teacher; a single one where targets are fused)."""

    total: Tensor
    token: Tensor  # (heads,)
    map: Tensor  # (heads,)
    relation: Tensor  # (K,)


class DMT(nn.Module):
    """A student and what it needs to learn from K teachers; a batch of pictures to the losses.

    Args:
        student: the encoder, all that is kept. [paper: ViT-T, -S or -B]
        teachers: `Teachers`; or their widths D_k, when what they say comes from a `dmt_cache.Cache`.
        mask_ratio: share of patches that the student does not see [anc: 0.75; house: 0.5 in the pocket].
        target_norm, statistics: see `TargetNorm` [house].
        fusion: "separate": a head and a loss for each teacher, averaged [house]. "mean": one target, the mean of the
            teachers [house]; "gate": one target, weighted anew for each token [2nd: CoMAD], see `fuse`.
        token, map, relation: weights a, b, c of the three losses [house: 1, 1, 0]; what weighs 0 is not built.
        weights: w_k of the teachers [house: 1].
        map_region: the map loss looks at "all" positions [anc: G2SD], or only at the "removed" ones.
        beta: where smooth L1 turns from a square into a line [anc: 2].
        decoder: its width, depth and heads; one of `DECODERS` or a tuple [anc: G2SD's sizes].
        temperature: of the gate [house].

    Raises:
        BadParameter: an option outside its choices, or options that exclude each other.
    """

    def __init__(
        self,
        student: ViT,
        teachers: Teachers | Sequence[int],
        *,
        mask_ratio: float = 0.75,
        target_norm: str = "channel",
        statistics: str = "batch",
        fusion: str = "separate",
        token: float = 1.0,
        map: float = 1.0,
        relation: float = 0.0,
        weights: Sequence[float] | None = None,
        map_region: str = "all",
        beta: float = 2.0,
        decoder: str | tuple[int, int, int] = "small",
        temperature: float = 0.1,
    ):
        super().__init__()
        taught = isinstance(teachers, Teachers)
        widths = teachers.widths if taught else tuple(teachers)
        weights = (1.0,) * len(widths) if weights is None else tuple(float(w) for w in weights)
        for name, value, accepted in (("fusion", fusion, FUSIONS), ("map_region", map_region, REGIONS)):
            if value not in accepted:
                raise BadParameter(name, value, accepted)
        if not widths:
            raise BadParameter("teachers", widths, "one or more")
        if len(weights) != len(widths) or min(weights) < 0 or not sum(weights):
            raise BadParameter("weights", weights, f"{len(widths)} numbers of 0 or more, not all 0")
        if min(token, map, relation) < 0 or not token + map + relation:
            raise BadParameter("token, map, relation", (token, map, relation), "0 or more, not all 0")
        count = visible(student.patches, mask_ratio)
        if map and map_region == "removed" and count == student.patches:
            raise BadParameter("map_region", map_region, "'all', when nothing is hidden from the student")
        if taught:
            grid = next(iter(teachers.models.values())).patches
            if grid != student.patches:
                raise BadParameter("student", f"{student.patches} patches", f"{grid}, as the teachers have")
            # with fused targets only what all teachers see can be compared
            least = teachers.counts(student.patches, count)
            if map and map_region == "removed" and min(least) == count:
                raise BadParameter("map_region", map_region, "'all', when a teacher sees no more than the student")
        if relation:
            if not taught:
                raise BadParameter("relation", relation, "0, when what the teachers say is read from a cache")
            if set(teachers.heads) != {student.heads}:
                wanted = f"{teachers.heads}, not {student.heads}"
                raise BadParameter(
                    "relation",
                    relation,
                    f"heads in the student's last block as in the teachers' ({wanted}): ViT(last_heads=...)",
                )
        if isinstance(decoder, str):
            if decoder not in DECODERS:
                raise BadParameter("decoder", decoder, tuple(DECODERS))
            decoder = DECODERS[decoder]
        self.student, self.teachers = student, teachers if taught else None
        self.mask_ratio, self.fusion, self.beta, self.temperature = mask_ratio, fusion, beta, temperature
        self.token, self.map, self.relation, self.map_region = token, map, relation, map_region
        self.weights, self.widths = weights, widths
        self.target_norms = nn.ModuleList(TargetNorm(width, target_norm, statistics) for width in widths)
        heads = widths if fusion == "separate" else (max(widths),)
        # fused targets live in one space: that of the widest teacher, into which others are turned by a fixed matrix
        # with orthonormal rows (a learned one could make all targets zero) [house]
        self.common = fusion != "separate" and len(set(widths)) > 1
        if self.common:
            generator = torch.Generator().manual_seed(0)
            for k, width in enumerate(widths):
                square = torch.linalg.qr(torch.randn(heads[0], heads[0], generator=generator))[0]
                self.register_buffer(f"turn{k}", square[:width] * math.sqrt(heads[0] / width))
        self.adapters = nn.ModuleList(nn.Linear(student.width, width) for width in heads) if token else None
        self.decoder = Decoder(student.width, *decoder, student.grid) if map else None
        self.map_heads = nn.ModuleList(nn.Linear(decoder[0], width) for width in heads) if map else None
        for part in (self.adapters, self.map_heads):
            if part is not None:
                part.apply(_initialise)

    def targets(self, taught: Taught | Sequence[Tensor]) -> list[Tensor]:
        """t_k (B, N, D_k), float32: each teacher's tokens, normalised; turned into one space where they are fused."""
        tokens = taught.tokens if isinstance(taught, Taught) else taught
        if len(tokens) != len(self.widths) or any(t.shape[-1] != w for t, w in zip(tokens, self.widths, strict=False)):
            shapes = [tuple(t.shape) for t in tokens]
            raise BadParameter("taught", shapes, f"{len(self.widths)} tensors, {self.widths} wide")
        found = [norm(t) for norm, t in zip(self.target_norms, tokens, strict=True)]
        return [t @ getattr(self, f"turn{k}") for k, t in enumerate(found)] if self.common else found

    def fuse(self, targets: Sequence[Tensor], predicted: Tensor) -> Tensor:
        """One target (B, N, D) of all teachers' (in one space).

        "mean": their weighted mean. "gate": a weight for each teacher and token, the softmax over teachers of the
        cosine between the student's prediction and the teacher's target times the teacher's mean cosine with the other
        teachers, over the temperature.
        """
        share = predicted.new_tensor(self.weights, dtype=torch.float32)
        stacked = torch.stack(list(targets))  # (K, B, N, D)
        if self.fusion == "mean" or len(targets) == 1:
            return torch.einsum("k,kbnd->bnd", share / share.sum(), stacked)
        unit = F.normalize(stacked, dim=-1)
        affinity = torch.einsum("bnd,kbnd->kbn", F.normalize(predicted.detach().float(), dim=-1), unit)
        every = torch.einsum("jbnd,kbnd->jkbn", unit, unit)
        agreement = (every.sum(0) - torch.diagonal(every).movedim(-1, 0)) / (len(targets) - 1)
        gate = (affinity * agreement / self.temperature + share.log()[:, None, None]).softmax(0)
        return torch.einsum("kbn,kbnd->bnd", gate, stacked)

    def forward(
        self,
        images: Tensor,
        taught: Taught | Sequence[Tensor] | None = None,
        noise: Tensor | None = None,
        trace: dict | None = None,
    ) -> Losses:
        """The losses of pictures (B, 3, S, S).

        Args:
            taught: what the teachers say of them, where it is known (a cache); otherwise they are asked, once.
            noise: (B, L) the patches with the least of it are visible; None: drawn.
            trace: receives "keep" (B, V), "latent" z, "targets", "tokens" A_k(z) and "maps" p_k, lists by head.
        """
        patches, seen = self.student.patches, {} if trace is None else trace
        if noise is None:
            noise = torch.rand(len(images), patches, device=images.device)
        count = visible(patches, self.mask_ratio)
        order = noise.argsort(1)
        keep = order[:, :count]
        view, counts = "full", (patches,) * len(self.widths)
        if taught is None:
            if self.teachers is None:
                raise BadParameter("taught", None, "what the teachers say: this DMT was made with their widths alone")
            taught = self.teachers(images, order, count, relations=bool(self.relation))
            view, counts = self.teachers.view, self.teachers.counts(patches, count)
        targets = self.targets(taught)

        if self.relation:
            # the last block's queries, keys and values; the block itself then runs as always
            x, last = self.student.embed(images, keep), len(self.student.blocks) - 1
            for block in self.student.blocks[:last]:
                x = block(x)
            own_qkv, latent = self.student.qkv(x), self.student.norm(self.student.blocks[last](x))
        else:
            latent = self.student(images, keep)
        seen |= {"keep": keep, "latent": latent, "targets": targets}

        zero = latent.new_zeros(1 if self.fusion != "separate" else len(targets), dtype=torch.float32)
        token = mapped = zero
        if self.adapters is not None:
            # of a narrower view the student's patches are the first
            at = [take(t, keep) if view == "full" else t[:, : 1 + count] for t in targets]
            seen["tokens"] = [adapter(latent) for adapter in self.adapters]
            token = self._compare(seen["tokens"], at)
        if self.decoder is not None:
            decoded = self.decoder(latent, keep)
            seen["maps"] = [head(decoded) for head in self.map_heads]
            mapped = self._map_loss(seen["maps"], targets, order, count, view, counts)
        related = latent.new_zeros(len(self.widths), dtype=torch.float32)
        if self.relation:
            index = F.pad(keep + 1, (1, 0))[None, :, None, :, None]  # the class token and V
            at = [qkv.take_along_dim(index, 3) if view == "full" else qkv[:, :, :, : 1 + count] for qkv in taught.qkv]
            related = torch.stack([sum(relation_loss(own_qkv, qkv)) for qkv in at])

        share = related.new_tensor(self.weights)
        by_head = self.token * token + self.map * mapped
        total = (share * by_head).mean() if self.fusion == "separate" else by_head[0]
        return Losses(total + self.relation * (share * related).mean(), token, mapped, related)

    def _compare(
        self, predicted: Sequence[Tensor], targets: Sequence[Tensor], weight: Sequence[Tensor] | None = None
    ) -> Tensor:
        """The feature loss of each head, (heads,)."""
        if self.fusion != "separate":
            targets = [self.fuse(targets, predicted[0])]
        weight = weight or [None] * len(targets)
        pairs = zip(predicted, targets, weight, strict=True)
        return torch.stack([feature_loss(p, t, self.beta, w) for p, t, w in pairs])

    def _map_loss(
        self, maps: list[Tensor], targets: list[Tensor], order: Tensor, count: int, view: str, counts: Sequence[int]
    ) -> Tensor:
        """The map loss of each head, at the positions that its teacher sees (all of them under a full view)."""
        if view != "full":
            if self.fusion != "separate":  # the positions that all teachers see
                counts = (min(counts),) * len(counts)
                targets = [t[:, : 1 + counts[0]] for t in targets]
            maps = [take(p, order[:, :n]) for p, n in zip(maps, counts, strict=False)]
        weight = None
        if self.map_region == "removed":
            place = order.argsort(1) if view == "full" else torch.arange(order.shape[1], device=order.device)[None]
            hidden = F.pad((place >= count).float().expand(len(order), -1), (1, 0))  # not the class token
            weight = [hidden[:, : p.shape[1]] for p in maps]
        return self._compare(maps, targets, weight)

    def export(self) -> ViT:
        """The student alone, a copy in eval mode: what is fine-tuned afterwards."""
        return copy.deepcopy(self.student).eval()


def loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """For `fit.fit`: a batch is pictures, of which the teachers are asked, or pictures and each teacher's tokens."""
    return model(batch[0], batch[1:] or None).total
