"""DMT: comprehensive distillation with multiple self-supervised teachers (Liu et al., ICASSP 2024). A RECONSTRUCTION.

Several frozen ViTs, each pre-trained without labels by a different method, are distilled into one student, also without
labels.

    x (B, 3, S, S) --each frozen teacher k-->    y_k (B, 1 + L, D_k)  --norm-->  targets t_k
    the visible patches V of x      --student--> z   (B, 1 + |V|, D)
    z --adapter A_k-->      compared with t_k on V                        token loss
    z --decoder, head k-->  p_k (B, 1 + L, D_k), compared with t_k        feature-map loss
    only the student is used afterwards

Only the paper's abstract and a paragraph of the introduction were available, and there is no public code: WHAT
IS DISTILLED INTO WHAT, AND BY WHICH LOSS, IS OUR CHOICE. It follows ancestors with public code, G2SD (decoder,
smooth L1 on normalised features) and MAE (masking). Each choice names its source:

    [paper]  the abstract or the first paragraph of the introduction      [anc]    an ancestor's published code
    [2nd]    second-hand, an abstract of a later paper                    [house]  us

Shapes: B images, L patches (V of them visible to the student), K teachers, D a width, N = 1 + L tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import Amount, BadParameter, Count, Share, check_choice, check_range, typed
from ...training.hardware import average_over_devices
from ..layers.frozen import frozen_copy
from ..layers.mae import Decoder, initialise, take, visible
from .vit import ViT

NORMS = ("ln", "channel")
STATISTICS = ("batch", "running")
MOMENTUM = 0.01  # weight of a new batch in running statistics [house]
BETA = 2.0  # where smooth L1 turns from a square into a line [anc: G2SD]
# G2SD's decoders for the students [anc]: width, depth, heads
DECODERS = {"tiny": (128, 4, 4), "small": (256, 4, 8), "base": (512, 4, 16), "pocket": (32, 1, 4)}


# --- teachers and targets ---------------------------------------------------------------------------------------------


class Teachers(nn.Module):
    """K frozen ViTs, always in eval mode; their targets are the last block's tokens before the final norm [house].

    Args:
        models: the teachers by name [paper: three self-supervised ViT-Base; 2nd: MAE, MoCo v3, iBOT]; copied.
    """

    def __init__(self, models: Mapping[str, ViT]):
        super().__init__()
        self.models = nn.ModuleDict({name: frozen_copy(model) for name, model in models.items()})

    def train(self, mode: bool = True) -> Teachers:
        return super().train(False)

    @property
    def widths(self) -> tuple[int, ...]:
        """D_k."""
        return tuple(model.width for model in self.models.values())

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Tokens y_k, each (B, 1 + L, D_k), of images (B, 3, S, S)."""
        return [model.hidden(images)[0] for model in self.models.values()]


class TargetNorm(nn.Module):
    """A teacher's tokens (B, N, D_k) on a common scale, float32.

    Args:
        width: D_k.
        kind: "ln": LayerNorm without affine over the channels, eps 1e-6 [anc: G2SD]. "channel": after it each channel
            to mean 0 and std 1 over the batch and its tokens [house, section 14.4].
        statistics: of "channel": those of the "batch", or "running" ones, a mean over batches (those of all devices),
            for large training runs.
    """

    def __init__(self, width: int, kind: str = "channel", statistics: str = "batch"):
        super().__init__()
        check_choice("target_norm", kind, NORMS)
        check_choice("statistics", statistics, STATISTICS)
        self.kind, self.running = kind, kind == "channel" and statistics == "running"
        if self.running:
            self.register_buffer("mean", torch.zeros(width))
            self.register_buffer("variance", torch.ones(width))
            self.register_buffer("batches", torch.zeros(()))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}square" in state:  # a training of version 0.2.0 left the mean of squares
            state[f"{prefix}variance"] = state.pop(f"{prefix}square") - state[f"{prefix}mean"].square()
        super()._load_from_state_dict(state, prefix, *args)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        x = F.layer_norm(tokens.float(), tokens.shape[-1:], eps=1e-6)
        if self.kind == "ln":
            return x
        if self.running and not self.training:
            mean, variance = self.mean, self.variance
        else:  # squares of deviations: in float32 a mean of squares less the squared mean loses a small variance
            mean = x.mean((0, 1))  # (D_k,)
            mean = average_over_devices(mean) if self.running else mean
            variance = (x - mean).square().mean((0, 1))
        if self.running and self.training:
            # the first batches have equal weight, to limit the influence of the initial values
            self.batches += 1
            share = torch.clamp(1 / self.batches, min=MOMENTUM)
            variance = average_over_devices(variance) + (1 - share) * (mean - self.mean).square()
            mean, variance = self.mean.lerp_(mean, share), self.variance.lerp_(variance, share)
        return (x - mean) / variance.clamp_min(1e-6).sqrt()


# --- student and losses -----------------------------------------------------------------------------------------------


class Losses(NamedTuple):
    """The loss, and its parts by teacher."""

    total: Tensor
    token: Tensor  # (K,)
    map: Tensor  # (K,)


class DMT(nn.Module):
    """A student and the modules that distil K teachers into it; a batch of images to the losses.

    Args:
        student: the encoder, trained in place; `export` returns it. [paper: ViT-T, -S or -B]
        teachers: `Teachers`; or their widths D_k, when their tokens come from a `dmt.cache.Cache`.
        mask_ratio: share of patches that are masked for the student [anc: 0.75; house: 0.5 at the pocket profile].
        target_norm, statistics: see `TargetNorm` [house].
        token_weight, map_weight: of the two losses [house: 1, 1]; modules that only a loss of weight 0 needs are not
            built.
        decoder: one of `DECODERS` [anc: G2SD's sizes].
    """

    @typed
    def __init__(
        self,
        student: ViT,
        teachers: Teachers | Sequence[Count],
        *,
        mask_ratio: Share = 0.75,
        target_norm: str = "channel",
        statistics: str = "batch",
        token_weight: Amount = 1.0,
        map_weight: Amount = 1.0,
        decoder: str = "small",
    ):
        super().__init__()
        self.student = student
        self.teachers: Any = teachers if isinstance(teachers, Teachers) else None
        widths = teachers.widths if isinstance(teachers, Teachers) else teachers
        check_range("teachers", len(widths), 1)
        self.widths = tuple(widths)
        self.visible = visible(student.patches, mask_ratio)
        if not (token_weight or map_weight):
            raise BadParameter(
                "token_weight", 0, "more than 0 where map_weight is 0: without a loss nothing is learned"
            )
        self.token_weight, self.map_weight = token_weight, map_weight
        self.target_norms = nn.ModuleList(TargetNorm(width, target_norm, statistics) for width in widths)
        check_choice("decoder", decoder, DECODERS)
        sizes = DECODERS[decoder]
        self.adapters = nn.ModuleList(nn.Linear(student.width, width) for width in widths if token_weight)
        self.decoder = None
        if map_weight:
            self.decoder = Decoder(student.width, *sizes, student.patch_embed.grid_size[0]).initialise()
        self.map_heads = nn.ModuleList(nn.Linear(sizes[0], width) for width in widths if map_weight)
        self.adapters.apply(initialise)
        self.map_heads.apply(initialise)

    def forward(self, images: Tensor, tokens: Sequence[Tensor] | None = None, noise: Tensor | None = None) -> Losses:
        """The losses of images (B, 3, S, S).

        Args:
            tokens: of the teachers, each (B, 1 + L, D_k), from a cache; None: computed.
            noise: (B, L) the patches with the least of it are visible; None: drawn.
        """
        if noise is None:
            noise = torch.rand(len(images), self.student.patches, device=images.device)
        keep = noise.argsort(1)[:, : self.visible]  # (B, V), in random order
        tokens = self.teachers(images) if tokens is None else tokens  # y_k: (B, 1 + L, D_k)
        count = 1 + self.student.patches
        shapes = [(len(images), count, width) for width in self.widths]
        if [tuple(y.shape) for y in tokens] != shapes:  # the token loss would compare other positions
            raise BadParameter("tokens", [tuple(y.shape) for y in tokens], f"{shapes}, of the student's positions")
        # t_k: (B, 1 + L, D_k), float32 (2)
        targets = [norm(y) for norm, y in zip(self.target_norms, tokens, strict=True)]
        z = self.student(images, keep)  # (B, 1 + V, D) (1)
        token = mapped = z.new_zeros(len(targets), dtype=torch.float32)
        if self.adapters:
            visible_targets = [take(t, keep) for t in targets]  # (B, 1 + V, D_k)
            token = self.compare([adapter(z) for adapter in self.adapters], visible_targets)  # (3)
        if self.decoder is not None:
            decoded = self.decoder(z, keep)  # (B, 1 + L, E)
            mapped = self.compare([head(decoded) for head in self.map_heads], targets)  # (4)
        return Losses((self.token_weight * token + self.map_weight * mapped).mean(), token, mapped)  # (5)

    def compare(self, predicted: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Smooth L1 [anc: G2SD] of each teacher, (K,)."""
        pairs = zip(predicted, targets, strict=True)
        return torch.stack([F.smooth_l1_loss(p.float(), t, beta=BETA) for p, t in pairs])

    def export(self) -> ViT:
        """The student alone, a copy in eval mode: what is fine-tuned afterwards."""
        return copy.deepcopy(self.student).eval()


def loss(model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Tensor]:
    """For `fit`: the loss and the means of its parts. A batch is images, or images and each teacher's tokens."""
    total, token, mapped = model(batch[0], batch[1:] or None)
    return {"loss": total, "token loss": token.detach().mean(), "map loss": mapped.detach().mean()}
