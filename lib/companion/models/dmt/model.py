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
smooth L1 on normalised features), TinyMIM (relations) and MAE (masking), and the abstract of CoMAD (views, gate). Each
choice names its source:

    [paper]  the abstract or the first paragraph of the introduction      [anc]    an ancestor's published code
    [2nd]    second-hand, an abstract of a later paper                    [house]  us

Shapes: B images, L patches (V of them visible to the student), K teachers, D a width, N = 1 + L tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import BadParameter, check_choice
from ...training.fit import average_over_devices
from ..layers.mae import Decoder, initialise, take, visible
from ..layers.precision import without_autocast
from .vit import ViT

VIEWS = ("full", "same", "lighter")
NORMS = ("ln", "channel", "none")
STATISTICS = ("batch", "running")
FUSIONS = ("separate", "mean", "gate")
BETA = 2.0  # where smooth L1 turns from a square into a line [anc: G2SD]
TEMPERATURE = 0.1  # of the gate [house]
# G2SD's decoders for the students [anc]: width, depth, heads
DECODERS = {"tiny": (128, 4, 4), "small": (256, 4, 8), "base": (512, 4, 16), "pocket": (32, 1, 4)}


# --- teachers and targets ---------------------------------------------------------------------------------------------


class TeacherOutput(NamedTuple):
    """The outputs of K teachers for a batch, without autograd."""

    tokens: Sequence[Tensor]  # each (B, 1 + L, D_k) in raster order; under a narrower view (B, 1 + n_k, D_k)
    seen: Sequence[Tensor] | None = None  # under a narrower view each (B, n_k), the patches of the tokens
    qkv: Sequence[Tensor] | None = None  # each (3, B, heads_k, N, d_k) of the last block, for the relation loss


class Teachers(nn.Module):
    """K frozen ViTs; targets are the last block's tokens before the final norm [house].

    Args:
        models: the teachers by name [paper: three self-supervised ViT-Base; 2nd: MAE, MoCo v3, iBOT]; copied.
        view: the patches that a teacher receives [house: all, "full"]. "same": the student's visible patches [anc:
            G2SD]. "lighter": these and more, a share of its own for each, in steps from the student's to 1 [2nd:
            CoMAD].
    """

    def __init__(self, models: Mapping[str, ViT], *, view: str = "full"):
        super().__init__()
        check_choice("teacher_view", view, VIEWS)
        if len({model.patches for model in models.values()}) != 1:
            raise BadParameter("teachers", {n: m.patches for n, m in models.items()}, "one or more, of the same grid")
        copies = {name: copy.deepcopy(model) for name, model in models.items()}
        self.models = nn.ModuleDict(copies).requires_grad_(False).eval()
        self.view = view

    def train(self, mode: bool = True) -> Teachers:
        super().train(mode)
        self.models.eval()
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.models)

    @property
    def widths(self) -> tuple[int, ...]:
        """D_k."""
        return tuple(model.width for model in self.models.values())

    @property
    def heads(self) -> tuple[int, ...]:
        """Heads of the last blocks."""
        return tuple(model.heads for model in self.models.values())

    def counts(self, patches: int, student: int) -> list[int]:
        """How many patches each teacher receives, when the student receives `student` of `patches`."""
        k = len(self.models)
        if self.view == "lighter":
            shares = [student / patches + (1 - student / patches) * (i + 1) / k for i in range(k)]
            return [max(student, round(share * patches)) for share in shares]
        return [patches if self.view == "full" else student] * k

    @torch.no_grad()
    def forward(
        self, images: Tensor, order: Tensor | None = None, student: int = 0, relations: bool = False
    ) -> TeacherOutput:
        """Tokens of images (B, 3, S, S).

        Args:
            order: (B, L) the patches, the student's visible ones first; needed by the views "same" and "lighter".
            student: how many of them are the student's.
            relations: queries, keys and values too.
        """
        models, seen = list(self.models.values()), None
        if self.view != "full":
            if order is None:
                raise BadParameter("order", None, f"the order of the patches, which teacher_view = {self.view!r} needs")
            seen = [order[:, :count] for count in self.counts(order.shape[1], student)]
        pairs = list(zip(models, seen or [None] * len(models), strict=True))
        if not relations:
            return TeacherOutput([model.hidden(images, keep=keep)[0] for model, keep in pairs], seen)
        qkv, tokens = zip(*(model.last_block(images, keep) for model, keep in pairs), strict=True)
        return TeacherOutput(tokens, seen, qkv)


class TargetNorm(nn.Module):
    """A teacher's tokens (B, N, D_k) on a common scale.

    Args:
        width: D_k.
        kind: "ln": LayerNorm without affine over the channels, eps 1e-6 [anc: G2SD]. "channel": after it each channel
            to mean 0 and std 1 over the batch and its tokens [house, section 14.4]. "none": unchanged.
        statistics: of "channel": those of the "batch", or "running" ones, a mean over batches (those of all devices),
            for large training runs.
        momentum: weight of a new batch in the running ones.
    """

    def __init__(self, width: int, kind: str = "channel", statistics: str = "batch", momentum: float = 0.01):
        super().__init__()
        check_choice("target_norm", kind, NORMS)
        check_choice("statistics", statistics, STATISTICS)
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
        mean, square = x.mean((0, 1)), x.square().mean((0, 1))  # (D_k,)
        if self.statistics == "running":
            if self.training:
                self._update(mean, square)
            mean, square = self.mean, self.square
        return (x - mean) / (square - mean.square()).clamp_min(1e-6).sqrt()

    def _update(self, mean: Tensor, square: Tensor) -> None:
        # the first batches have equal weight, to limit the influence of the initial values
        self.batches += 1
        share = torch.clamp(1 / self.batches, min=self.momentum)
        self.mean.lerp_(average_over_devices(mean), share)
        self.square.lerp_(average_over_devices(square), share)


class Rotation(nn.Module):
    """Targets (..., D_k) in the space of the widest teacher, by a fixed matrix with orthonormal rows: angles are kept.

    A learned matrix could make all targets zero [house].
    """

    def __init__(self, width: int, widest: int, generator: torch.Generator):
        super().__init__()
        square = torch.linalg.qr(torch.randn(widest, widest, generator=generator))[0]
        self.register_buffer("matrix", square[:width] * math.sqrt(widest / width))

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            return x @ self.matrix


def mean_target(targets: Sequence[Tensor]) -> Tensor:
    """The mean (B, N, D) of all teachers' targets, in float32 also under autocast."""
    stacked = torch.stack(list(targets))  # (K, B, N, D)
    with without_autocast(stacked.device):
        return torch.einsum("k,kbnd->bnd", stacked.new_ones(len(targets)) / len(targets), stacked)


def gated_target(targets: Sequence[Tensor], predicted: Tensor) -> Tensor:
    """One target (B, N, D), in which each token weighs the teachers by their agreement with student and others (6).

    The weights are the softmax over teachers of the cosine between the student's prediction and the teacher's target
    times the teacher's mean cosine with the other teachers, over the temperature. In float32 also under autocast.
    """
    stacked, others = torch.stack(list(targets)), len(targets) - 1  # (K, B, N, D)
    with without_autocast(stacked.device):
        unit = F.normalize(stacked, dim=-1)
        affinity = torch.einsum("bnd,kbnd->kbn", F.normalize(predicted.detach().float(), dim=-1), unit)
        every = torch.einsum("jbnd,kbnd->jkbn", unit, unit)
        agreement = (every.sum(0) - torch.diagonal(every).movedim(-1, 0)) / others  # (K, B, N)
        return torch.einsum("kbn,kbnd->bnd", (affinity * agreement / TEMPERATURE).softmax(0), stacked)


# --- losses -----------------------------------------------------------------------------------------------------------


def relation_maps(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Relations of queries with keys and of values with values: logits (B, heads, N, N), over the root of d.

    In float32 also under autocast.
    """
    with without_autocast(qkv.device):
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
    """A student and the modules that distil K teachers into it; a batch of images to the losses.

    Args:
        student: the encoder, trained in place; `export` returns it. [paper: ViT-T, -S or -B]
        teachers: `Teachers`; or their widths D_k, when their tokens come from a `dmt.cache.Cache`.
        mask_ratio: share of patches that are masked for the student [anc: 0.75; house: 0.5 at the pocket profile].
        target_norm, statistics: see `TargetNorm` [house].
        fusion: "separate": a head and a loss for each teacher, averaged [house]. "mean": one target, the mean of the
            teachers [house]; "gate": one target, with weights for each token [2nd: CoMAD].
        token_weight, map_weight, relation_weight: of the three losses [house: 1, 1, 0]; modules that only a loss of
            weight 0 needs are not built.
        decoder: its width, depth and heads; one of `DECODERS` or a tuple [anc: G2SD's sizes].

    Raises `BadParameter`: an option outside its choices, or options that exclude each other.
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
        token_weight: float = 1.0,
        map_weight: float = 1.0,
        relation_weight: float = 0.0,
        decoder: str | tuple[int, int, int] = "small",
    ):
        super().__init__()
        live = teachers if isinstance(teachers, Teachers) else None
        self.widths = widths = tuple(teachers) if live is None else live.widths
        check_choice("fusion", fusion, FUSIONS)
        visible(student.patches, mask_ratio)
        if relation_weight and (live is None or set(live.heads) != {student.heads}):
            accepted = "0, unless the teachers run and the student's last block has as many heads: ViT(last_heads=...)"
            raise BadParameter("relation_weight", relation_weight, accepted)
        self.student, self.teachers = student, live
        self.mask_ratio, self.fusion = mask_ratio, fusion
        self.token_weight, self.map_weight, self.relation_weight = token_weight, map_weight, relation_weight
        self.target_norms = nn.ModuleList(TargetNorm(width, target_norm, statistics) for width in widths)
        heads, rotated = widths, []
        if fusion != "separate":
            heads, generator = (max(widths),), torch.Generator().manual_seed(0)
            rotated = [Rotation(width, max(widths), generator) for width in widths] if len(set(widths)) > 1 else []
        self.rotations = nn.ModuleList(rotated)
        sizes = DECODERS[decoder] if isinstance(decoder, str) else decoder
        self.adapters = self.decoder = self.map_heads = None
        if token_weight:
            self.adapters = nn.ModuleList(nn.Linear(student.width, width) for width in heads)
        if map_weight:
            self.decoder = Decoder(student.width, *sizes, student.grid).initialise()
            self.map_heads = nn.ModuleList(nn.Linear(sizes[0], width) for width in heads)
        for part in (self.adapters, self.map_heads):
            if part is not None:
                part.apply(initialise)

    def forward(
        self, images: Tensor, output: TeacherOutput | Sequence[Tensor] | None = None, noise: Tensor | None = None
    ) -> Losses:
        """The losses of images (B, 3, S, S).

        Args:
            output: of the teachers, or their tokens (B, N, D_k) from a cache; None: computed.
            noise: (B, L) the patches with the least of it are visible; None: drawn.
        """
        patches = self.student.patches
        noise = torch.rand(len(images), patches, device=images.device) if noise is None else noise
        count, order = visible(patches, self.mask_ratio), noise.argsort(1)  # (B, L)
        keep = order[:, :count]  # (B, V)
        if output is None:
            if self.teachers is None:
                raise BadParameter("output", None, "tokens: this DMT was made with the teachers' widths alone")
            output = self.teachers(images, order, count, bool(self.relation_weight))
        output = output if isinstance(output, TeacherOutput) else TeacherOutput(output)
        seen, targets = output.seen, self.targets(output.tokens)  # t_k: (B, 1 + L, D_k), or (B, 1 + n_k, D_k) (2)
        if seen and self.fusion != "separate":  # fused: the positions that all teachers receive
            least = min(index.shape[1] for index in seen)
            seen, targets = [index[:, :least] for index in seen], [t[:, : 1 + least] for t in targets]

        if self.relation_weight:
            qkv, x = self.student.last_block(images, keep)
            z = self.student.norm(x)
        else:
            z = self.student(images, keep)  # (B, 1 + V, D) (1)

        token = mapped = z.new_zeros(1 if self.fusion != "separate" else len(targets), dtype=torch.float32)
        if self.adapters is not None:  # (3); the student's patches are the first of a narrower view
            visible_targets = [t[:, : 1 + count] if seen else take(t, keep) for t in targets]  # (B, 1 + V, D_k)
            token = self._compare([adapter(z) for adapter in self.adapters], visible_targets)
        if self.decoder is not None and self.map_heads is not None:  # (4)
            decoded = self.decoder(z, keep)  # (B, 1 + L, E)
            maps = [head(decoded) for head in self.map_heads]  # p_k: (B, 1 + L, D_k)
            if seen:
                maps = [take(p, index) for p, index in zip(maps, seen, strict=False)]  # (B, 1 + n_k, D_k)
            mapped = self._compare(maps, targets)
        relation = z.new_zeros(len(targets), dtype=torch.float32)
        if self.relation_weight:
            relation = self._relations(qkv, output, keep)
        total = (self.token_weight * token + self.map_weight * mapped).mean()  # (5)
        return Losses(total + self.relation_weight * relation.mean(), token, mapped, relation)

    def targets(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """t_k (B, N, D_k), float32: each teacher's tokens, normalised; in one space where they are fused (2)."""
        if [t.shape[-1] for t in tokens] != list(self.widths):
            shapes = [tuple(t.shape) for t in tokens]
            raise BadParameter("output", shapes, f"{len(self.widths)} tensors, {self.widths} wide")
        normed = [norm(t) for norm, t in zip(self.target_norms, tokens, strict=True)]
        return [rotate(t) for rotate, t in zip(self.rotations, normed, strict=True)] if self.rotations else normed

    def _compare(self, predicted: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Smooth L1 [anc: G2SD] of each head, (heads,)."""
        if self.fusion == "gate" and len(targets) > 1:
            targets = [gated_target(targets, predicted[0])]
        elif self.fusion != "separate":
            targets = [mean_target(targets)]
        pairs = zip(predicted, targets, strict=True)
        return torch.stack([F.smooth_l1_loss(p.float(), t, beta=BETA) for p, t in pairs])

    def _relations(self, qkv: Tensor, output: TeacherOutput, keep: Tensor) -> Tensor:
        """The relation loss with each teacher, (K,), on the student's [CLS] token and visible patches."""
        if output.qkv is None:
            raise BadParameter("output", "tokens alone", "queries, keys and values too (relation_weight > 0)")
        index = F.pad(keep + 1, (1, 0))[None, :, None, :, None]  # (1, B, 1, 1 + V, 1)
        at = [t[:, :, :, : index.shape[3]] if output.seen else t.take_along_dim(index, 3) for t in output.qkv]
        return torch.stack([sum(relation_loss(qkv, t)) for t in at])

    def export(self) -> ViT:
        """The student alone, a copy in eval mode: what is fine-tuned afterwards."""
        return copy.deepcopy(self.student).eval()


def loss(model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Tensor]:
    """For `fit`: the loss and the means of its parts. A batch is images, or images and each teacher's tokens."""
    losses = model(batch[0], batch[1:] or None)
    parts = {"token loss": losses.token, "map loss": losses.map, "relation loss": losses.relation}
    return {"loss": losses.total} | {name: part.detach().mean() for name, part in parts.items()}
