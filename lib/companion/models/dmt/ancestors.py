"""Distillation of one masked autoencoder, by three papers that DMT builds on; all exact facts of their official codes.

    G2SD     the student's decoder predicts what the teacher's decoder holds half-way  (Huang et al., CVPR 2023)
    DMAE     the student fills in pixels, and one of its blocks predicts a teacher's   (Bai et al., CVPR 2023)
    TinyMIM  the student's last attention has the teacher's relations between tokens    (Ren et al., CVPR 2023)

They are what the reconstruction in `dmt` is made of, and baselines for it. Written anew, checked against outputs
recorded from pengzhiliang/G2SD at 6146adf, UCSC-VLAA/DMAE at a0f4959 and OliverRensu/TinyMIM at d084705.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import BadCheckpoint, BadParameter
from ..layers.clip_prompting import load_official
from .model import ViT, relation_loss, relation_maps, visible
from .teachers import MAE


def _parts(state: Mapping[str, Tensor], what: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The teacher's and the student's tensors of one state dict, by their prefix."""
    parts = [{n.removeprefix(p): t for n, t in state.items() if n.startswith(p)} for p in ("teacher.", "student.")]
    unknown = [name for name in state if not name.startswith(("teacher.", "student."))]
    if unknown or not all(parts):
        raise BadCheckpoint(
            what, [p for p, own in zip(("teacher.", "student."), parts, strict=True) if not own], unknown
        )
    return parts[0], parts[1]


def _unscaled(tokens: Tensor) -> Tensor:
    """LayerNorm without affine, eps 1e-6."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)


class G2SDLosses(NamedTuple):
    """The released loss is `decoder`; the other two are in the code, one multiplied by 0, one not called."""

    decoder: Tensor
    encoder: Tensor
    relation: Tensor


class G2SD(nn.Module):
    """G2SD's generic stage: teacher and student, both masked autoencoders, see the same visible patches.

    Args:
        teacher: frozen, with its decoder.
        student: trained, with a smaller decoder.
        block: the teacher's decoder blocks that are run.
        beta: of smooth L1.
    """

    def __init__(self, teacher: MAE, student: MAE, *, block: int = 4, beta: float = 2.0):
        super().__init__()
        if teacher.encoder.patches != student.encoder.patches:
            raise BadParameter("student", student.encoder.patches, f"{teacher.encoder.patches} patches, as the teacher")
        if not 1 <= block <= len(teacher.decoder.blocks):
            raise BadParameter("block", block, f"1 to {len(teacher.decoder.blocks)}")
        self.teacher, self.student, self.block, self.beta = teacher.requires_grad_(False).eval(), student, block, beta
        widths = [(m.encoder.width, m.decoder.embed.out_features) for m in (student, teacher)]
        (encoder, decoder), (to_encoder, to_decoder) = widths
        self.encoder_head = Mlp(encoder, to_encoder, to_encoder)
        self.decoder_head = Mlp(decoder, to_decoder, to_decoder)

    def train(self, mode: bool = True) -> G2SD:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self, images: Tensor, noise: Tensor | None = None, trace: dict | None = None, relation_heads: int | None = None
    ) -> G2SDLosses:
        """The losses of pictures (B, 3, S, S); `trace` receives predictions and targets, and "hidden" (B, L).

        Args:
            relation_heads: into how many heads the relations are split; None: they are not computed, and 0.
        """
        patches = self.student.encoder.patches
        noise = torch.rand(len(images), patches, device=images.device) if noise is None else noise
        keep = noise.argsort(1)[:, : visible(patches, self.student.mask_ratio)]
        with torch.no_grad():
            own, before = _last(self.teacher.encoder, images, keep)
            latent = self.teacher.encoder.norm(own)
            target = _unscaled(self.teacher.decoder.hidden(latent, keep, self.block))
            target_encoder = _unscaled(own)
        tokens, student_before = _last(self.student.encoder, images, keep)
        z = self.student.encoder.norm(tokens)
        predicted = self.decoder_head(self.student.decoder.hidden(z, keep))  # without the decoder's norm
        predicted_encoder = self.encoder_head(z)
        related = [z.new_zeros(())]
        if relation_heads is not None:
            maps = [
                _all_relations(vit, x, relation_heads)
                for vit, x in ((self.teacher.encoder, before), (self.student.encoder, student_before))
            ]
            related = [_divergence(t, s) for t, s in zip(*maps, strict=True)]
        if trace is not None:
            hidden = torch.ones_like(noise).scatter(1, keep, 0)
            trace |= {
                "predicted": predicted,
                "target": target,
                "predicted_encoder": predicted_encoder,
                "target_encoder": target_encoder,
                "hidden": hidden,
            }
        return G2SDLosses(
            F.smooth_l1_loss(predicted, target, beta=self.beta),
            F.smooth_l1_loss(predicted_encoder, target_encoder, beta=self.beta),
            torch.stack(related).mean(),
        )

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], decoder_heads: tuple[int, int] = (16, 8)) -> G2SD:
        """Teacher and student under the official names, each after its prefix, in eval mode. Raises `BadCheckpoint`.

        Args:
            decoder_heads: of the teacher and the student; tensors do not say them.
        """
        teacher, student = _parts(state, "G2SD")
        heads = {"encoder_head": "encoderfeature_pred", "decoder_head": "decoderfeature_pred"}
        plain = {n: t for n, t in student.items() if not n.startswith(tuple(heads.values()))}
        model = cls(
            MAE.from_official(teacher, decoder_heads=decoder_heads[0]),
            MAE.from_official(plain, decoder_heads=decoder_heads[1]),
        )
        for ours, theirs in heads.items():
            part = getattr(model, ours)
            own = {n: t for n, t in student.items() if n.startswith(theirs)}
            load_official(part, own, {n: f"{theirs}.{n}" for n in part.state_dict()}, "G2SD's student")
        return model.eval()


def _last(vit: ViT, images: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """The last block's output, before the final norm, and its input."""
    x, last = vit.embed(images, keep), vit.blocks[-1]
    for block in vit.blocks[:-1]:
        x = block(x)
    return last(x), x


def _all_relations(vit: ViT, x: Tensor, heads: int) -> list[Tensor]:
    """The nine relations of queries, keys and values (B, heads, N, N), logits, with heads of the relation's own."""
    qkv = vit.qkv(x).transpose(2, 3).flatten(3).unflatten(3, (heads, -1)).transpose(2, 3)  # (3, B, heads, N, d)
    return [a @ b.mT * a.shape[-1] ** -0.5 for a in qkv for b in qkv]


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of softmaxes, summed over a row, mean over the rest."""
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()


class DMAE(nn.Module):
    """DMAE: masked modelling of pixels, and one block's features as a teacher's, both of unit length, by L1.

    Args:
        teacher: frozen; its blocks after `teacher_block` are not run.
        student: trained.
        student_block, teacher_block: counted from 0 (8 of 12 and 17 of 24 as released).
        hidden: False: one linear layer between the widths in place of an MLP.
    """

    def __init__(
        self, teacher: ViT, student: MAE, *, student_block: int = 8, teacher_block: int = 17, hidden: bool = True
    ):
        super().__init__()
        for name, block, vit in (
            ("student_block", student_block, student.encoder),
            ("teacher_block", teacher_block, teacher),
        ):
            if not 0 <= block < len(vit.blocks):
                raise BadParameter(name, block, f"0 to {len(vit.blocks) - 1}")
        self.teacher, self.student = teacher.requires_grad_(False).eval(), student
        self.student_block, self.teacher_block = student_block, teacher_block
        width = student.encoder.width
        self.head = Mlp(width, teacher.width, teacher.width) if hidden else nn.Linear(width, teacher.width)

    def train(self, mode: bool = True) -> DMAE:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: Tensor, noise: Tensor | None = None, trace: dict | None = None) -> tuple[Tensor, Tensor]:
        """The pixel and the embedding loss, to be added with weight 1; `trace`: also "target", and what MAE's has."""
        seen = {} if trace is None else trace
        patches = self.student.encoder.patches
        noise = torch.rand(len(images), patches, device=images.device) if noise is None else noise
        inner = []
        hook = self.student.encoder.blocks[self.student_block].register_forward_hook(
            lambda m, i, out: inner.append(out)
        )
        with hook:
            pixel = self.student(images, noise, seen)
        with torch.no_grad():
            seen["block"] = self.teacher.hidden(images, (self.teacher_block,), seen["keep"])[0]
        return pixel, F.l1_loss(F.normalize(self.head(inner[0]), dim=-1), F.normalize(seen["block"], dim=-1))

    @classmethod
    def from_official(
        cls,
        state: Mapping[str, Tensor],
        *,
        student_block: int,
        teacher_block: int,
        decoder_heads: int = 16,
        normalise: bool = True,
    ) -> DMAE:
        """Teacher and student under the official names, each after its prefix, in eval mode. Raises `BadCheckpoint`.

        Args:
            student_block, teacher_block: as in `DMAE`; decoder_heads, normalise: as in `MAE`, of the student.
        """
        teacher, student = _parts(state, "DMAE")
        start = "aligned_feature_projection_heads.0."
        own = {n: t for n, t in student.items() if n.startswith(start)}
        plain = MAE.from_official({n: t for n, t in student.items() if n not in own}, decoder_heads=decoder_heads)
        plain.normalise = normalise
        model = cls(
            ViT.from_official(teacher, what="DMAE's teacher"),
            plain,
            student_block=student_block,
            teacher_block=teacher_block,
            hidden=f"{start}fc1.weight" in own,
        )
        load_official(model.head, own, {n: start + n for n in model.head.state_dict()}, "DMAE's student")
        return model.eval()


class TinyMIM(nn.Module):
    """TinyMIM: nothing is hidden; the relations of a teacher's block are those that the student's last block learns.

    The student's last block needs as many heads as the teacher's: `ViT(last_heads=...)`. Its MLP, its output projection
    and the final norm get no gradient from this loss.
    """

    def __init__(self, teacher: ViT, student: ViT, *, layer: int = -1):
        super().__init__()
        if not -len(teacher.blocks) <= layer < len(teacher.blocks):
            raise BadParameter("layer", layer, f"a block of the teacher, which has {len(teacher.blocks)}")
        heads = teacher.blocks[layer].attn.num_heads
        if student.heads != heads:
            raise BadParameter("student", f"{student.heads} heads in the last block", f"{heads}, as the teacher")
        self.teacher, self.student = teacher.requires_grad_(False).eval(), student
        self.layer = layer % len(teacher.blocks)

    def train(self, mode: bool = True) -> TinyMIM:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: Tensor, trace: dict | None = None) -> tuple[Tensor, Tensor]:
        """The losses of queries with keys, and of values, to be added; `trace`: "teacher" and "student" logits."""
        with torch.no_grad():
            teacher = self._qkv(self.teacher, images, self.layer)
        student = self._qkv(self.student, images, len(self.student.blocks) - 1)
        if trace is not None:
            trace |= {"teacher": relation_maps(teacher), "student": relation_maps(student)}
        return relation_loss(student, teacher)

    @staticmethod
    def _qkv(vit: ViT, images: Tensor, layer: int) -> Tensor:
        return vit.qkv(vit.hidden(images, (layer - 1,))[0] if layer else vit.embed(images), layer)

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], student_heads: int | None = None) -> TinyMIM:
        """Teacher and student under the official names, each after its prefix, in eval mode. Raises `BadCheckpoint`.

        Args:
            student_heads: of all its blocks but the last, which has the teacher's. None: one for 64 channels.
        """
        teacher, student = _parts(state, "TinyMIM")
        first = ViT.from_official(teacher, what="TinyMIM's teacher")
        second = ViT.from_official(student, student_heads, "TinyMIM's student")
        second.blocks[-1].attn = reheaded(second.blocks[-1].attn, first.heads)
        return cls(first, second).eval()


def reheaded(attention: nn.Module, heads: int) -> nn.Module:
    """The same tensors, split into other heads."""
    attention.num_heads, attention.head_dim = heads, attention.qkv.in_features // heads
    attention.scale = attention.head_dim**-0.5
    return attention
