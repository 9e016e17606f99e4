"""H-ViT: hierarchical Vision Transformers on whole slides (Grisi, Litjens, van der Laak; 2023, arXiv 2312.12619).

A slide has gigapixels and one label. Three Transformers are stacked: tokens of 16 px make a patch of 256 px, n x n
patches make a region of 1024, 2048 or 4096 px, M regions make the slide.

    pixels  (M, 3, R, R)   --patch encoder-->    patch embeddings   (M, n n, 384)
                           --region encoder-->   region embeddings  (M, 192)
                           --slide Transformer, gated attention pooling-->  one grade

The lower levels are pre-trained without labels (`dino`). **Global** H-ViT freezes both and trains the slide level;
**Local** H-ViT trains the region level with it. Every level can start the forward pass: pixels, stored patch embeddings
or stored region embeddings.

Written from the facts of computationalpathologygroup/hvit at 444bb72; its tensors, and HIPT's, load by `from_official`.

Shapes: B slides, M regions a slide, P = n n patches a region, T tokens a patch, D the width of a level, K grades.
"""

from __future__ import annotations

import copy
import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...backbones import read_state
from ...errors import BadParameter, check_choice
from ...ops import unpickle
from ...ops.recorded import Recorded
from ..layers.pos_embed import resize_pos_embed
from ..layers.state_dicts import OfficialModel, check_names, depth, load_official

VARIANTS = ("global", "local", "whole")
HEADS = ("classification", "regression", "ordinal", "coral", "corn")
POSITIONS = ("none", "sine", "learned")
LARGEST_CROP = 0.875  # of the side: DINO's global crops, for which both encoders' position embeddings are made

# sizes of the three levels: the paper's, and those that a CPU trains in seconds
SIZES: dict[str, dict[str, Any]] = {
    "paper": {
        "patch": {"image": 256, "token": 16, "dim": 384, "depth": 12, "heads": 6},
        "region": {"dim": 192, "depth": 6, "heads": 6},
        "slide": {"heads": 3, "dropout": 0.25},
    },
    "pocket": {
        "patch": {"image": 32, "token": 4, "dim": 48, "depth": 3, "heads": 3, "mlp_ratio": 2, "std": None},
        "region": {"dim": 48, "depth": 2, "heads": 3, "mlp_ratio": 2, "std": None},
        "slide": {"heads": 3, "dropout": 0.1},
    },
}


# --- the two encoders -------------------------------------------------------------------------------------------------


class Encoder(Recorded, nn.Module):
    """A ViT over a grid of tokens, read out at its [CLS] token: the base of `PatchEncoder` and `RegionEncoder`.

    Args:
        side: tokens a side of the position embedding, which is resized to the input's grid on every forward pass.
        std: of the truncated normal that weights, [CLS] token and positions are drawn from. None: 1/sqrt(fan in) for
            weights, 0.3 for [CLS] token and positions: a small width needs it for outputs that depend on the input.
        drop_path: largest drop probability of stochastic depth, that of the last block.
    """

    def __init__(
        self,
        side: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4,
        *,
        drop_path: float = 0.0,
        std: float | None = 0.02,
    ):
        super().__init__()
        if heads < 1 or dim % heads:
            raise BadParameter("dim, heads", (dim, heads), "1 or more heads, which divide the width")
        self.dim, self.heads, self.std, self.grad_checkpointing = dim, heads, std, False
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side**2, dim))
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_ratio, qkv_bias=True, norm_layer=norm, drop_path=drop_path * i / max(depth - 1, 1))
            for i in range(depth)
        )
        self.norm = norm(dim)

    def _start(self) -> None:
        """Draw the initial values; biases 0."""
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=self.std or 0.3)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=self.std or module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.bias)

    def embed(self, x: Tensor) -> Tensor:
        """Tokens (B, D, h, w) without positions."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass, which takes less memory."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor, keep: Tensor | None = None, trace: dict | None = None) -> Tensor:
        """The [CLS] token (B, D) after the last norm.

        Args:
            x: (B, 3, H, W) pixels, or (B, D_in, n, n) embeddings.
            keep: (B, h w) bool, row by row: tokens that show tissue. The others are keys in no block. The [CLS] token
                always is a key, so in an image without tissue it attends to itself alone.
            trace: receives "positions" (1, 1 + h w, D), "tokens" and "block0" (B, 1 + h w, D), and "attention"
                (B, heads, 1 + h w): the last block's weights with the [CLS] token as query. No other part of the
                attention map is formed.
        """
        return self.norm(self._encode(x, keep, trace)[:, 0])

    def forward_features(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """All tokens (B, 1 + h w, D) after the last norm, [CLS] first; arguments as in `forward`."""
        return self.norm(self._encode(x, keep))

    def _encode(self, x: Tensor, keep: Tensor | None, trace: dict | None = None) -> Tensor:
        tokens = self.embed(x)
        positions = resize_pos_embed(self.pos_embed, tokens.shape[-2:])
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens.flatten(2).mT], 1) + positions
        mask = None
        if keep is not None:
            if keep.shape != (len(x), x.shape[1] - 1):
                raise BadParameter("keep", tuple(keep.shape), f"one entry for each of the {(len(x), x.shape[1] - 1)}")
            mask = F.pad(keep.bool(), (1, 0), value=True)[:, None, None].expand(-1, -1, x.shape[1], -1)
        if trace is not None:
            trace |= {"positions": positions, "tokens": x}
        for i, block in enumerate(self.blocks):
            if trace is not None and i == len(self.blocks) - 1:
                trace["attention"] = self._row(block, x, mask)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, attn_mask=mask, use_reentrant=False)
            else:
                x = block(x, attn_mask=mask)
            if trace is not None and i == 0:
                trace["block0"] = x
        return x

    def _row(self, block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
        """The attention of the [CLS] token (B, heads, N) in a block."""
        q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q[:, :, 0, None] @ k.mT) * block.attn.scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, :1], -math.inf)
        return scores.softmax(-1)[:, :, 0]

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], heads: int | None = None) -> Encoder:
        """The encoder of HIPT's or the authors' tensors (see `read_checkpoint`); all sizes but `heads` are theirs.

        A DINO checkpoint's projection head is not read.

        Raises `BadCheckpoint`: names that are missing, unknown, or of another shape.
        """
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
        needed = ["pos_embed", "cls_token", "blocks.0.mlp.fc1.weight", cls._FIRST]
        check_names(state, needed, f"H-ViT's {cls.__name__}")
        table, dim = state["pos_embed"], state["cls_token"].shape[-1]
        model = cls._sized(
            state,
            side=math.isqrt(table.shape[1] - 1),
            dim=dim,
            depth=depth(state, "blocks."),
            heads=max(dim // cls._HEAD_WIDTH, 1) if heads is None else heads,
            mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / dim,
        )
        load_official(model, state, {name: name for name in model.state_dict()}, f"H-ViT's {cls.__name__}")
        return model.eval()


class PatchEncoder(Encoder):
    """The patch level: a ViT-S/16 on patches of 256 px, at pocket size anything smaller.

    Args:
        image: side of a patch in pixels.
        token: side of a token in pixels.
        side: of the position embedding, in tokens; by default that of DINO's largest crop.
        others: see `Encoder`.
    """

    _FIRST, _HEAD_WIDTH = "patch_embed.proj.weight", 64

    def __init__(
        self,
        image: int = 256,
        token: int = 16,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4,
        *,
        side: int | None = None,
        **others: Any,
    ):
        if image % token:
            raise BadParameter("image, token", (image, token), "a patch that its tokens tile")
        super().__init__(side or int(image * LARGEST_CROP // token), dim, depth, heads, mlp_ratio, **others)
        self.image, self.token = image, token
        self.patch_embed = PatchEmbed(None, token, 3, dim, flatten=False)
        self._start()

    def embed(self, x: Tensor) -> Tensor:
        """From pixels (B, 3, H, W), any multiple of the token's side."""
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % self.token or x.shape[3] % self.token:
            raise BadParameter("patches", tuple(x.shape), f"(B, 3, H, W), H and W multiples of {self.token}")
        return self.patch_embed(x)

    @classmethod
    def _sized(cls, state: Mapping[str, Tensor], **sizes: Any) -> PatchEncoder:
        token = state[cls._FIRST].shape[-1]
        # a position embedding of 14 x 14 is made for patches of 16 x 16 tokens
        return cls(math.ceil(sizes["side"] / LARGEST_CROP) * token, token, **sizes)


class RegionEncoder(Encoder):
    """The region level: a ViT of width 192 over the grid of a region's patch embeddings.

    Args:
        patches: patches a side of the region that the position embedding is made for: 4, 8, 16 for 1024, 2048, 4096 px.
        inputs: width of the patch embeddings.
        side: of the position embedding, in patches; by default that of DINO's largest crop: 3, 7, 14.
        others: see `Encoder`.
    """

    _FIRST, _HEAD_WIDTH = "phi.0.weight", 32

    def __init__(
        self,
        patches: int = 8,
        inputs: int = 384,
        dim: int = 192,
        depth: int = 6,
        heads: int = 6,
        mlp_ratio: float = 4,
        *,
        side: int | None = None,
        **others: Any,
    ):
        super().__init__(side or int(patches * LARGEST_CROP), dim, depth, heads, mlp_ratio, **others)
        self.inputs = inputs
        self.phi = nn.Sequential(nn.Linear(inputs, dim), nn.GELU())
        self._start()

    def embed(self, x: Tensor) -> Tensor:
        """From patch embeddings (B, D_in, n, n), rows first."""
        if x.ndim != 4 or x.shape[1] != self.inputs:
            raise BadParameter("grid", tuple(x.shape), f"(B, {self.inputs}, n, n)")
        return self.phi(x.movedim(1, -1)).movedim(-1, 1)

    @classmethod
    def _sized(cls, state: Mapping[str, Tensor], **sizes: Any) -> RegionEncoder:
        return cls(inputs=state[cls._FIRST].shape[1], **sizes)


# --- the slide level --------------------------------------------------------------------------------------------------


class GatedPool(nn.Module):
    """Gated attention pooling: alpha = softmax(w . (tanh(V h) * sigmoid(U h)) + c), z = sum alpha h.

    The released code's `dropout` is 0.25 whatever else is set, or none at all.
    """

    def __init__(self, dim: int, dropout: float = 0.25):
        super().__init__()
        self.content, self.gate = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.score = nn.Linear(dim, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From h (B, M, D), and which of the M are not padding (B, M) bool, to z (B, D) and alpha (B, M)."""
        gated = self.dropout(self.content(h).tanh()) * self.dropout(self.gate(h).sigmoid())
        score = self.score(gated)[..., 0]
        if present is not None:
            score = score.masked_fill(~present, -math.inf)
        alpha = score.softmax(-1)
        return (alpha[:, None] @ h)[:, 0], alpha


class SlidePosition(nn.Module):
    """A position embedding added to each region's embedding; off in the released configurations.

    Args:
        kind: "sine" or "learned"; regions are numbered in the order of their file names.
        longest: entries of the table.
    """

    def __init__(self, kind: str, dim: int, longest: int = 512, dropout: float = 0.25):
        super().__init__()
        self.longest = longest
        self.dropout = nn.Dropout(dropout if kind == "sine" else 0.0)
        if kind == "learned":
            self.embedder = nn.Embedding(longest, dim)
        else:
            angle = torch.arange(longest)[:, None] * torch.exp(torch.arange(0, dim, 2) * (-math.log(10_000.0) / dim))
            table = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :dim]
            self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """From and to (B, M, D). Raises `BadParameter`: more regions than positions."""
        regions = x.shape[1]
        if regions > self.longest:
            raise BadParameter("regions", regions, f"at most {self.longest} positions (`longest`)")
        table = self.embedder.weight if hasattr(self, "embedder") else self.table
        return self.dropout(x + table[:regions])


class SlideTransformer(Recorded, nn.Module):
    """The slide level: two post-norm Transformer layers over the regions, gated attention pooling, one output.

    Args:
        inputs: width of the region embeddings.
        dim: width; `inputs` by default.
        classes: grades K.
        head: what the outputs mean, one of `HEADS`; see `loss` and `predict`.
        position, longest: see `SlidePosition`.
    """

    def __init__(
        self,
        inputs: int = 192,
        classes: int = 6,
        head: str = "classification",
        *,
        dim: int | None = None,
        depth: int = 2,
        heads: int = 3,
        dropout: float = 0.25,
        position: str = "none",
        longest: int = 512,
    ):
        super().__init__()
        check_choice("head", head, HEADS)
        check_choice("position", position, POSITIONS)
        if classes < 2:
            raise BadParameter("classes", classes, "2 or more")
        dim = dim or inputs
        self.inputs, self.classes, self.head = inputs, classes, head
        self.phi = nn.Sequential(nn.Linear(inputs, dim), nn.ReLU(), nn.Dropout(dropout))
        self.position = None if position == "none" else SlidePosition(position, dim, longest, dropout)
        layer = nn.TransformerEncoderLayer(dim, heads, dim, dropout, activation="relu", batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.pool = GatedPool(dim, 0.25 if dropout else 0.0)
        self.rho = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout))
        outputs = {"classification": classes, "regression": 1, "coral": 1}.get(head, classes - 1)
        self.classifier = nn.Linear(dim, outputs, bias=head != "coral")
        if head == "coral":
            self.thresholds = nn.Parameter(torch.zeros(classes - 1))

    def forward(self, x: Tensor, present: Tensor | None = None, trace: dict | None = None) -> Tensor:
        """Outputs (B, K), (B, 1) or (B, K - 1), by the head.

        Args:
            x: (B, M, D) region embeddings.
            present: (B, M) bool, False where slides of fewer regions were padded; the padding changes nothing.
            trace: receives "phi", "positioned", "transformer" (B, M, D), "pooling" (B, M), "slide" (B, D).
        """
        if x.ndim != 3 or x.shape[2] != self.inputs or not x.shape[1]:
            raise BadParameter("regions", tuple(x.shape), f"(slides, 1 or more regions, {self.inputs})")
        # looked at where no GPU has to be waited for in a training step
        if present is not None and (present.is_cpu or not self.training) and not present.any(1).all():
            raise BadParameter("present", "a slide without a region", "at least one region a slide")
        found = {"phi": self.phi(x)}
        h = found["phi"] if self.position is None else self.position(found["phi"])
        found["positioned"] = h
        h = self.transformer(h, src_key_padding_mask=None if present is None else ~present)
        z, alpha = self.pool(h, present)
        z = self.rho(z)
        if trace is not None:
            trace |= found | {"transformer": h, "pooling": alpha, "slide": z}
        logits = self.classifier(z)
        return logits + self.thresholds if self.head == "coral" else logits


# --- the whole --------------------------------------------------------------------------------------------------------


class HViT(OfficialModel):
    """The hierarchy of three levels. Its input is that of its lowest level or of an upper one (see `forward`).

    The levels are copied: what the caller hands over is neither frozen nor moved.

    Args:
        slide: the slide level.
        region, patch: the levels below; None where their embeddings are on disk.
        variant: what is trained: "global" the slide level, "local" the region level too, "whole" everything.
        positions: train the region level's position embedding also where that level is frozen.
    """

    def __init__(
        self,
        slide: SlideTransformer,
        region: RegionEncoder | None = None,
        patch: PatchEncoder | None = None,
        variant: str = "global",
        *,
        positions: bool = False,
    ):
        super().__init__()
        check_choice("variant", variant, VARIANTS)
        if (variant != "global" and region is None) or (variant == "whole" and patch is None):
            raise BadParameter("variant", variant, "one whose trained levels are given")
        if region is not None and region.dim != slide.inputs:
            raise BadParameter("region", f"width {region.dim}", f"{slide.inputs}, what the slide level reads")
        if patch is not None and (region is None or patch.dim != region.inputs):
            raise BadParameter("patch", f"width {patch.dim}", "a region level that reads it")
        self.patch, self.region, self.slide = copy.deepcopy(patch), copy.deepcopy(region), copy.deepcopy(slide)
        self.variant = variant
        frozen = {"global": ("patch", "region"), "local": ("patch",), "whole": ()}[variant]
        self.frozen = [level for level in frozen if getattr(self, level) is not None]
        for level in self.frozen:
            getattr(self, level).requires_grad_(False)
        if positions and self.region is not None:
            self.region.pos_embed.requires_grad_(True)
        self.train(False)

    def train(self, mode: bool = True) -> HViT:
        """As usual, but frozen levels stay in eval mode: features on disk were made without stochastic depth."""
        super().train(mode)
        for level in self.frozen:
            getattr(self, level).eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As in `Encoder`, for both encoders."""
        for level in (self.patch, self.region):
            if level is not None:
                level.set_grad_checkpointing(enable)

    def forward(
        self, x: Tensor, *, tissue: Tensor | None = None, present: Tensor | None = None, trace: dict | None = None
    ) -> Tensor:
        """Outputs of the slide level (B, ...).

        Args:
            x: (B, M, 3, R, R) pixels, (B, M, P, D) patch embeddings row by row, or (B, M, D) region embeddings.
            tissue: (B, M, P, T) share of tissue in each token, where the background is masked.
            present: see `SlideTransformer.forward`.
            trace: receives, besides the slide level's, "patches" (B, M, P, D), "regions" (B, M, D), and the attention
                of the encoders' [CLS] tokens: "patch_attention" (B, M, P, heads, t, t), "region_attention"
                (B, M, heads, n, n).
        """
        if x.ndim not in (3, 4, 5):
            raise BadParameter("slides", tuple(x.shape), "(B, M, 3, R, R), (B, M, P, D) or (B, M, D)")
        b, m = x.shape[:2]
        if x.ndim == 5:
            x = self.embed_patches(x.flatten(0, 1), None if tissue is None else tissue.flatten(0, 1), trace)
            x = x.unflatten(0, (b, m))
        if x.ndim == 4:
            keep = None if tissue is None else (tissue > 0).any(-1).flatten(0, 1)
            x = self.embed_regions(x.flatten(0, 1), keep, trace).unflatten(0, (b, m))
        if trace is not None:
            for key in ("patch_attention", "region_attention", "patches", "regions"):
                if key in trace:
                    trace[key] = trace[key].unflatten(0, (b, m))
        return self.slide(x, present, trace)

    def embed_patches(
        self, regions: Tensor, tissue: Tensor | None = None, trace: dict | None = None, batch: int = 128
    ) -> Tensor:
        """Patch embeddings (M, P, D) of regions (M, 3, R, R); `batch` patches at a time where that level is frozen."""
        if self.patch is None:
            raise BadParameter("slides", tuple(regions.shape), "embeddings: this model has no patch level")
        side = self.patch.image
        if regions.shape[-1] % side or regions.shape[-2] != regions.shape[-1]:
            raise BadParameter("region", tuple(regions.shape[-2:]), f"a square of patches of {side} px")
        n = regions.shape[-1] // side
        patches = regions.unfold(2, side, side).unfold(3, side, side)  # (M, 3, n, n, side, side)
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        keep = None if tissue is None else (tissue > 0).flatten(0, 1)
        out, rows = [], []
        for i in range(0, len(patches), batch):
            seen: dict | None = None if trace is None else {}
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.variant == "whole"):
                out.append(self.patch(patches[i : i + batch], None if keep is None else keep[i : i + batch], seen))
            rows += [] if seen is None else [_square(seen["attention"])]
        found = torch.cat(out).unflatten(0, (-1, n * n))
        if trace is not None:
            trace |= {"patches": found, "patch_attention": torch.cat(rows).unflatten(0, (-1, n * n))}
        return found

    def embed_regions(self, patches: Tensor, keep: Tensor | None = None, trace: dict | None = None) -> Tensor:
        """Region embeddings (M, D) of patch embeddings (M, P, D); `keep` (M, P) are the patches with tissue."""
        if self.region is None:
            raise BadParameter("slides", tuple(patches.shape), "region embeddings: this model has no region level")
        n = math.isqrt(patches.shape[1])
        if n * n != patches.shape[1]:
            raise BadParameter("patches", patches.shape[1], "a square number: a region is a square grid of them")
        seen: dict = {}
        found = self.region(patches.mT.unflatten(2, (n, n)), keep, None if trace is None else seen)
        if trace is not None:
            trace |= {"regions": found, "region_attention": _square(seen["attention"])}
        return found

    @classmethod
    def from_official(
        cls, state: Mapping[str, Tensor], head: str | None = None, *, position: str | None = None, **options: Any
    ) -> HViT:
        """H-ViT from the authors' tensors, with the levels and the sizes that they have.

        Args:
            head: what the outputs mean. Inferred for one output (a regression) and for free biases (CORAL); needed for
                several outputs.
            position: of `POSITIONS`; by default "learned" where the tensors hold that table, else "none". The sine
                table is computed, and need not be in a checkpoint.
            options: `variant`, by default "local" where there is a region level, else "global"; `positions`.

        Raises:
            BadParameter: several outputs and no `head`.
            BadCheckpoint: names that are missing, unknown, or of another shape.
        """
        parts = {
            level: {n.removeprefix(f"vit_{level}."): t for n, t in state.items() if n.startswith(f"vit_{level}.")}
            for level in ("patch", "region")
        }
        needed = ["global_phi.0.weight", "global_transformer.layers.0.linear1.weight", "classifier.weight"]
        check_names(state, needed, "H-ViT")
        outputs, kind = len(state["classifier.weight"]), head
        if "b" in state:
            kind, outputs = "coral", len(state["b"])
        elif outputs == 1:
            kind = "regression"
        if kind is None:
            raise BadParameter("head", None, [h for h in HEADS if h not in ("coral", "regression")])
        if head not in (None, kind):
            raise BadParameter("head", head, f"{kind!r}, which the tensors are of")
        learned = state.get("pos_encoder.embedder.weight")
        dim, inputs = state["global_phi.0.weight"].shape
        slide = SlideTransformer(
            inputs,
            {"regression": 6, "classification": outputs}.get(kind, outputs + 1),
            kind,
            dim=dim,
            depth=depth(state, "global_transformer.layers."),
            heads=3,
            position=position or ("none" if learned is None else "learned"),
            longest=512 if learned is None else len(learned),
        )
        region = RegionEncoder.from_official(parts["region"]) if parts["region"] else None
        patch = PatchEncoder.from_official(parts["patch"]) if parts["patch"] else None
        variant = options.pop("variant", "global" if region is None else "local")
        model = cls(slide, region, patch, variant, **options)
        load_official(model, state, model.official_names(), "H-ViT", ignored=("pos_encoder.pe",))
        return model

    def official_names(self) -> dict[str, str]:
        """Our tensor names to the authors'."""
        rules = (
            (r"(patch|region)\.", r"vit_\1."),
            (r"slide\.(phi|rho)\.", r"global_\1."),
            (r"slide\.transformer\.", "global_transformer."),
            (r"slide\.pool\.content\.", "global_attn_pool.attention_a.0."),
            (r"slide\.pool\.gate\.", "global_attn_pool.attention_b.0."),
            (r"slide\.pool\.score\.", "global_attn_pool.attention_c."),
            (r"slide\.classifier\.", "classifier."),
            (r"slide\.thresholds$", "b"),
            (r"slide\.position\.embedder\.", "pos_encoder.embedder."),
        )
        return {
            name: next(re.sub(f"^{ours}", theirs, name) for ours, theirs in rules if re.match(ours, name))
            for name in self.state_dict()
        }


def _square(attention: Tensor) -> Tensor:
    """From (B, heads, 1 + s s) to (B, heads, s, s): the [CLS] token left out, nothing renormalised."""
    side = math.isqrt(attention.shape[-1] - 1)
    return attention[..., 1:].unflatten(-1, (side, side))


def build(
    size: str = "paper",
    variant: str = "local",
    head: str = "regression",
    *,
    patches: int = 8,
    classes: int = 6,
    levels: Sequence[str] = ("patch", "region", "slide"),
    **slide: Any,
) -> HViT:
    """An H-ViT of random weights (torch's current seed), at one of `SIZES`.

    Args:
        patches: a side of the region: 4, 8 or 16 for 1024, 2048 or 4096 px; 4 at pocket size.
        levels: those that are built; the embeddings of the others are the model's input.
        slide: further options of `SlideTransformer`.
    """
    check_choice("size", size, SIZES)
    if unknown := set(levels) - {"patch", "region", "slide"}:
        raise BadParameter("levels", sorted(unknown), ("patch", "region", "slide"))
    sizes = SIZES[size]
    patch = PatchEncoder(**sizes["patch"]) if "patch" in levels else None
    region = RegionEncoder(patches, sizes["patch"]["dim"], **sizes["region"]) if "region" in levels else None
    top = SlideTransformer(sizes["region"]["dim"], classes, head, **sizes["slide"] | slide)
    return HViT(top, region, patch, variant)


# --- baselines --------------------------------------------------------------------------------------------------------


class PatchBag(Recorded, nn.Module):
    """A slide as a bag of patch embeddings, without positions: their mean, or gated attention over them (ABMIL).

    Args:
        pooling: "mean" or "attention".
        others: `inputs`, `classes`, `head`, `dropout` as in `SlideTransformer`.
    """

    def __init__(
        self,
        inputs: int = 384,
        classes: int = 6,
        head: str = "regression",
        pooling: str = "attention",
        *,
        dim: int = 192,
        dropout: float = 0.25,
    ):
        super().__init__()
        check_choice("pooling", pooling, ("mean", "attention"))
        check_choice("head", head, HEADS[:3])
        self.classes, self.head = classes, head
        self.phi = nn.Sequential(nn.Linear(inputs, dim), nn.ReLU(), nn.Dropout(dropout))
        self.pool = GatedPool(dim, dropout) if pooling == "attention" else None
        outputs = {"classification": classes, "regression": 1}.get(head, classes - 1)
        self.classifier = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(dim, outputs))

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """Outputs (B, ...) of patch embeddings (B, M, P, D); `present` (B, M) as in `SlideTransformer`."""
        h = self.phi(x)
        there = None if present is None else present[..., None].expand(h.shape[:3]).flatten(1)
        h = h.flatten(1, 2)
        if self.pool is not None:
            return self.classifier(self.pool(h, there)[0])
        weight = h.new_ones(h.shape[:2]) if there is None else there.to(h.dtype)
        return self.classifier((weight[..., None] * h).sum(1) / weight.sum(1, keepdim=True))


# --- losses, predictions, votes ---------------------------------------------------------------------------------------


def extended(grades: Tensor, classes: int) -> Tensor:
    """Grades y (B,) as K - 1 binary targets "the grade is above k" (B, K - 1): the first y entries are 1."""
    return (torch.arange(classes - 1, device=grades.device) < grades[:, None]).float()


def loss(head: str, outputs: Tensor, grades: Tensor, classes: int = 6, *, per_slide: bool = False) -> Tensor:
    """The loss of a head's outputs (B, ...) against grades (B,) in 0 .. K - 1.

    Args:
        per_slide: CORN's mean is taken over each slide's thresholds first, then over the slides, as in the authors'
            training, whose batches are one slide; by default over all (slide, threshold) pairs that count. The other
            losses are the same either way.
    """
    check_choice("head", head, HEADS)
    grades = grades.long()
    if grades.is_cpu and grades.numel() and (grades.min() < 0 or grades.max() >= classes):  # a GPU is not waited for
        raise BadParameter("grades", grades.tolist(), f"0 to {classes - 1}")
    if head == "classification":
        return F.cross_entropy(outputs, grades)
    if head == "regression":
        return F.mse_loss(outputs[:, 0], grades.to(outputs.dtype))
    targets = extended(grades, classes).to(outputs.dtype)
    each = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
    if head == "ordinal":
        return each.mean()
    if head == "coral":
        return each.sum(1).mean()
    # CORN: target k counts only for slides whose grade is at least k
    counted = torch.arange(classes - 1, device=grades.device) <= grades[:, None]
    if per_slide:
        return ((each * counted).sum(1) / counted.sum(1)).mean()
    return each[counted].sum() / counted.sum()


def predict(head: str, outputs: Tensor, classes: int = 6) -> Tensor:
    """The predicted grades (B,) of outputs (B, ...).

    Ordinal heads count the leading probabilities above one half; CORN multiplies them up first. (The released code
    leaves that product out in training and tuning: `predict("ordinal", ...)` gives what it computes there.)
    """
    check_choice("head", head, HEADS)
    if head == "classification":
        return outputs.argmax(1)
    if head == "regression":  # torch rounds halves to even
        return outputs[:, 0].round().clamp(0, classes - 1).long()
    probabilities = outputs.sigmoid()
    if head == "corn":
        probabilities = probabilities.cumprod(1)
    return (probabilities > 0.5).long().cumprod(1).sum(1)


def vote(grades: Sequence[int], *, isup: bool = True, seed: int = 0) -> int:
    """One grade from those of the folds: the most common one.

    Of two that are equally common, the one nearer to the remaining vote; of what is still equal, a random one.

    Args:
        isup: count the step between grades 0 and 1, no cancer and cancer, as 1.5.
        seed: of the random choice.
    """
    if not len(grades):
        raise BadParameter("grades", list(grades), "the grade of one fold or more")
    counts = Counter(int(g) for g in grades)  # keeps the order of first appearance
    most = max(counts.values())
    first = [g for g, count in counts.items() if count == most]
    rest = [g for g, count in counts.items() if count < most]
    if len(first) == 1:
        return first[0]
    if rest and len(first) == 2:

        def distance(grade: int) -> float:
            return sum(1.5 if isup and {grade, g} == {0, 1} else abs(grade - g) for g in rest)

        near, far = sorted(first, key=distance)
        if distance(near) < distance(far):
            return near
    return first[random.Random(seed).randint(0, len(first) - 1)]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of HIPT's or the authors' file without the prefixes of wrappers; of a DINO checkpoint, the teacher.

    Raises `CorruptFile` for a file that cannot be read.
    """
    saved = None if Path(path).suffix == ".safetensors" else unpickle.load_torch(path)
    teacher = saved.get("teacher") if isinstance(saved, dict) else None
    state = teacher if isinstance(teacher, dict) else read_state(path)
    return {re.sub(r"^(module\.)?(backbone\.)?", "", name): value for name, value in state.items()}
