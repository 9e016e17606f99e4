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

from ...backbones import per_channel
from ...errors import BadParameter, check_choice
from ...training.fit import average_over_devices
from ..layers.precision import without_autocast
from .vit import DECODERS, Decoder, ViT, initialise, take, visible

VIEWS = ("full", "same", "lighter")
NORMS = ("ln", "channel", "none")
STATISTICS = ("batch", "running")
FUSIONS = ("separate", "mean", "gate")
BETA = 2.0  # where smooth L1 turns from a square into a line [anc: G2SD]
TEMPERATURE = 0.1  # of the gate [house]


# --- teachers and targets ---------------------------------------------------------------------------------------------


class TeacherOutput(NamedTuple):
    """The outputs of K teachers for a batch, without autograd."""

    tokens: tuple[Tensor, ...]  # each (B, 1 + L, D_k) in raster order; under a narrower view (B, 1 + n_k, D_k)
    qkv: tuple[Tensor, ...] | None = None  # each (3, B, heads_k, N, d_k) of the last block, for the relation loss


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
        if not models:
            raise BadParameter("teachers", dict(models), "one or more")
        check_choice("teacher_view", view, VIEWS)
        if len({model.patches for model in models.values()}) > 1:
            raise BadParameter("teachers", {n: m.patches for n, m in models.items()}, "the same grid of patches in all")
        copies = {name: copy.deepcopy(model) for name, model in models.items()}
        self.models = nn.ModuleDict(copies).requires_grad_(False).eval()
        self.view = view

    def train(self, mode: bool = True) -> Teachers:
        """They stay in eval mode, independent of the student's mode."""
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
        """Heads of the last blocks."""
        return tuple(model.heads for model in self.models.values())

    def counts(self, patches: int, student: int) -> tuple[int, ...]:
        """How many patches each teacher receives, when the student receives `student` of `patches`."""
        k = len(self.models)
        if self.view == "full":
            return (patches,) * k
        if self.view == "same":
            return (student,) * k
        shares = [student / patches + (1 - student / patches) * (i + 1) / k for i in range(k)]
        return tuple(max(student, round(share * patches)) for share in shares)

    @torch.no_grad()
    def forward(
        self, images: Tensor, order: Tensor | None = None, student: int | None = None, relations: bool = False
    ) -> TeacherOutput:
        """Tokens of images (B, 3, S, S).

        Args:
            order: (B, L) the patches, the student's visible ones first; needed by the views "same" and "lighter".
            student: how many of them are the student's.
            relations: queries, keys and values too.
        """
        seen: Sequence[Tensor | None] = (None,) * len(self.models)
        if self.view != "full":
            if order is None or student is None:
                raise BadParameter("order", None, f"the order of the patches, which teacher_view = {self.view!r} needs")
            seen = [order[:, :count] for count in self.counts(order.shape[1], student)]
        tokens, all_qkv = [], []
        for model, keep in zip(self.models.values(), seen, strict=True):
            if relations:
                last = len(model.blocks) - 1
                x = model.hidden(images, (last - 1,), keep)[0] if last else model.embed(images, keep)
                all_qkv.append(model.qkv(x))
                tokens.append(model.blocks[last](x))
            else:
                tokens.append(model.hidden(images, keep=keep)[0])
        return TeacherOutput(tuple(tokens), tuple(all_qkv) if relations else None)


def grey(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) without their colour: the weighted mean of the channels (ITU-R 601), three times."""
    weights = per_channel((0.299, 0.587, 0.114), images.device).flatten().to(images.dtype)
    return torch.einsum("bchw,c->bhw", images, weights)[:, None].expand_as(images)


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
        mean, square = x.mean((0, 1)), x.square().mean((0, 1))
        if self.statistics == "running":
            if self.training:
                # the first batches have equal weight, to limit the influence of the initial values
                self.batches += 1
                share = torch.clamp(1 / self.batches, min=self.momentum)
                self.mean.lerp_(average_over_devices(mean), share)
                self.square.lerp_(average_over_devices(square), share)
            mean, square = self.mean, self.square
        return (x - mean) / (square - mean.square()).clamp_min(1e-6).sqrt()


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
            teachers [house]; "gate": one target, with weights for each token [2nd: CoMAD], see `fuse`.
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
        self.widths = tuple(teachers) if live is None else live.widths
        check_choice("fusion", fusion, FUSIONS)
        if not self.widths:
            raise BadParameter("teachers", self.widths, "one or more")
        weights = (token_weight, map_weight, relation_weight)
        if min(weights) < 0 or not sum(weights):
            raise BadParameter("token_weight, map_weight, relation_weight", weights, "0 or more, not all 0")
        visible(student.patches, mask_ratio)
        if live is not None and (grid := next(iter(live.models.values())).patches) != student.patches:
            raise BadParameter("student", f"{student.patches} patches", f"{grid}, as the teachers have")
        if relation_weight and live is None:
            raise BadParameter("relation_weight", relation_weight, "0, when the teachers' tokens are read from a cache")
        if relation_weight and live is not None and set(live.heads) != {student.heads}:
            accepted = f"heads in the student's last block as in the teachers' ({live.heads}, not {student.heads})"
            raise BadParameter("relation_weight", relation_weight, f"{accepted}: ViT(last_heads=...)")
        if isinstance(decoder, str):
            check_choice("decoder", decoder, DECODERS)
            decoder = DECODERS[decoder]
        self.student, self.teachers = student, live
        self.mask_ratio, self.fusion = mask_ratio, fusion
        self.token_weight, self.map_weight, self.relation_weight = weights
        self.target_norms = nn.ModuleList(TargetNorm(width, target_norm, statistics) for width in self.widths)
        heads = self.widths if fusion == "separate" else (max(self.widths),)
        # fused targets are in one space: that of the widest teacher, into which others are mapped by a fixed matrix
        # with orthonormal rows (a learned one could make all targets zero) [house]
        self.common = fusion != "separate" and len(set(self.widths)) > 1
        if self.common:
            generator = torch.Generator().manual_seed(0)
            for k, width in enumerate(self.widths):
                square = torch.linalg.qr(torch.randn(heads[0], heads[0], generator=generator))[0]
                self.register_buffer(f"turn{k}", square[:width] * math.sqrt(heads[0] / width))
        self.adapters = nn.ModuleList(nn.Linear(student.width, width) for width in heads) if token_weight else None
        self.decoder = Decoder(student.width, *decoder, student.grid) if map_weight else None
        self.map_heads = nn.ModuleList(nn.Linear(decoder[0], width) for width in heads) if map_weight else None
        for part in (self.adapters, self.map_heads):
            if part is not None:
                part.apply(initialise)

    def targets(self, output: TeacherOutput | Sequence[Tensor]) -> list[Tensor]:
        """t_k (B, N, D_k), float32: each teacher's tokens, normalised; mapped into one space where they are fused."""
        tokens = output.tokens if isinstance(output, TeacherOutput) else output
        if [t.shape[-1] for t in tokens] != list(self.widths):
            shapes = [tuple(t.shape) for t in tokens]
            raise BadParameter("teacher_output", shapes, f"{len(self.widths)} tensors, {self.widths} wide")
        found = [norm(t) for norm, t in zip(self.target_norms, tokens, strict=True)]
        with without_autocast(found[0].device):
            return [t @ getattr(self, f"turn{k}") for k, t in enumerate(found)] if self.common else found

    def fuse(self, targets: Sequence[Tensor], predicted: Tensor) -> Tensor:
        """One target (B, N, D) of all teachers' (in one space), in float32 also under autocast.

        "mean": their mean. "gate": a weight for each teacher and token, the softmax over teachers of the cosine between
        the student's prediction and the teacher's target times the teacher's mean cosine with the other teachers, over
        the temperature.
        """
        stacked, count = torch.stack(list(targets)), len(targets)  # (K, B, N, D)
        with without_autocast(stacked.device):
            if self.fusion == "mean" or count == 1:
                return torch.einsum("k,kbnd->bnd", stacked.new_ones(count) / count, stacked)
            unit = F.normalize(stacked, dim=-1)
            affinity = torch.einsum("bnd,kbnd->kbn", F.normalize(predicted.detach().float(), dim=-1), unit)
            every = torch.einsum("jbnd,kbnd->jkbn", unit, unit)
            agreement = (every.sum(0) - torch.diagonal(every).movedim(-1, 0)) / (count - 1)
            return torch.einsum("kbn,kbnd->bnd", (affinity * agreement / TEMPERATURE).softmax(0), stacked)

    def forward(
        self,
        images: Tensor,
        teacher_output: TeacherOutput | Sequence[Tensor] | None = None,
        noise: Tensor | None = None,
        trace: dict | None = None,
    ) -> Losses:
        """The losses of images (B, 3, S, S).

        Args:
            teacher_output: from a cache; None: computed by the teachers.
            noise: (B, L) the patches with the least of it are visible; None: drawn.
            trace: receives "keep" (B, V), "latent" z, "targets", "tokens" A_k(z) and "maps" p_k, lists by head.
        """
        patches, trace = self.student.patches, {} if trace is None else trace
        if noise is None:
            noise = torch.rand(len(images), patches, device=images.device)
        count, order = visible(patches, self.mask_ratio), noise.argsort(1)
        keep, view = order[:, :count], "full"
        seen: tuple[int, ...] = ()
        if teacher_output is None:
            if self.teachers is None:
                raise BadParameter("teacher_output", None, "tokens: this DMT was made with the teachers' widths alone")
            teacher_output, view = self.teachers(images, order, count, bool(self.relation_weight)), self.teachers.view
            seen = self.teachers.counts(patches, count)
        targets = self.targets(teacher_output)

        if self.relation_weight:
            # the last block's queries, keys and values; the block itself then runs normally
            last = len(self.student.blocks) - 1
            x = self.student.hidden(images, (last - 1,), keep)[0] if last else self.student.embed(images, keep)
            own_qkv, latent = self.student.qkv(x), self.student.norm(self.student.blocks[last](x))
        else:
            latent = self.student(images, keep)
        trace |= {"keep": keep, "latent": latent, "targets": targets}

        token = mapped = latent.new_zeros(1 if self.fusion != "separate" else len(targets), dtype=torch.float32)
        if self.adapters is not None:
            # of a narrower view the student's patches are the first
            at = [take(t, keep) if view == "full" else t[:, : 1 + count] for t in targets]
            trace["tokens"] = [adapter(latent) for adapter in self.adapters]
            token = self._compare(trace["tokens"], at)
        if self.decoder is not None and self.map_heads is not None:
            decoded = self.decoder(latent, keep)
            trace["maps"] = maps = [head(decoded) for head in self.map_heads]
            if view != "full":  # each teacher's positions; of fused targets those that all teachers receive
                counts = seen if self.fusion == "separate" else (min(seen),) * len(seen)
                targets = [t[:, : 1 + n] for t, n in zip(targets, counts, strict=True)]
                maps = [take(p, order[:, :n]) for p, n in zip(maps, counts, strict=False)]
            mapped = self._compare(maps, targets)
        related = latent.new_zeros(len(self.widths), dtype=torch.float32)
        if self.relation_weight:
            index = F.pad(keep + 1, (1, 0))[None, :, None, :, None]  # the [CLS] token and V
            qkv = teacher_output.qkv if isinstance(teacher_output, TeacherOutput) else None
            if qkv is None:
                raise BadParameter(
                    "teacher_output", "tokens alone", "queries, keys and values too (relation_weight > 0)"
                )
            at = [t.take_along_dim(index, 3) if view == "full" else t[:, :, :, : 1 + count] for t in qkv]
            related = torch.stack([sum(relation_loss(own_qkv, t)) for t in at])

        total = (self.token_weight * token + self.map_weight * mapped).mean()
        return Losses(total + self.relation_weight * related.mean(), token, mapped, related)

    def _compare(self, predicted: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Smooth L1 [anc: G2SD] of each head, (heads,)."""
        if self.fusion != "separate":
            targets = [self.fuse(targets, predicted[0])]
        pairs = zip(predicted, targets, strict=True)
        return torch.stack([F.smooth_l1_loss(p.float(), t, beta=BETA) for p, t in pairs])

    def export(self) -> ViT:
        """The student alone, a copy in eval mode: what is fine-tuned afterwards."""
        return copy.deepcopy(self.student).eval()


def loss(model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Tensor]:
    """For `fit`: the loss and the means of its parts. A batch is images, or images and each teacher's tokens."""
    found = model(batch[0], batch[1:] or None)
    parts = {"token loss": found.token, "map loss": found.map, "relation loss": found.relation}
    return {"loss": found.total} | {name: part.detach().mean() for name, part in parts.items()}
