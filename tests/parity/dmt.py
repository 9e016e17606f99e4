"""DMT's ancestors, whose cases hold teacher and student in one state dict, by our code.

G2SD     the student's decoder predicts the tokens of the teacher's decoder half-way     (Huang et al., CVPR 2023)
DMAE     the student predicts pixels, and one of its blocks predicts a teacher's         (Bai et al., CVPR 2023)
TinyMIM  the student's last attention has the teacher's relations between tokens         (Ren et al., CVPR 2023)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from companion.backbones import read_state
from companion.models.dmt.vit import ViT, encoder_state
from companion.models.layers.mae import MAE, visible_tokens
from companion.models.layers.state_dicts import load_official

from .runner import Case


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint; of a full training checkpoint the encoder, by its own names."""
    state = read_state(path)
    wrapped = any(name.startswith(("module.", "base_encoder.", "backbone.")) for name in state)
    return encoder_state(state) if wrapped else state


def _named(state: Mapping[str, Tensor], prefix: str, *without: str) -> dict[str, Tensor]:
    """The tensors after a prefix, but for those that begin with `without`."""
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return {name: value for name, value in found.items() if not name.startswith(without)}


def _mlp(inputs: int, outputs: int, state: Mapping[str, Tensor]) -> nn.Module:
    head = Mlp(inputs, outputs, outputs)
    load_official(head, state, None, "a head")
    return head


def _norm(tokens: Tensor) -> Tensor:
    """LayerNorm without affine, eps 1e-6."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)


def _parts(found: dict[str, Tensor], parts: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """The outputs, of some of them the recorded tokens and channels alone."""
    return found | {name: found[name][..., ::step, :channels] for name, (step, channels) in parts.items()}


@torch.no_grad()
def g2sd(case: Case) -> dict[str, Tensor]:
    """Teacher and student, both masked autoencoders, see the same visible patches; of the teacher's decoder blocks only
    the first are run. The released loss is that of the decoder; of the other two one has weight 0, one is never
    called."""
    facts, own = case.facts["settings"], _named(case.state, "student.")
    images, noise, heads = case.input("image"), case.input("mask_noise"), ("encoderfeature_pred", "decoderfeature_pred")
    ratio = facts["mask_ratio"]
    teacher = MAE.from_official(_named(case.state, "teacher."), **facts["teacher"], mask_ratio=ratio)
    student = MAE.from_official(_named(own, "", *heads), **facts["student"], mask_ratio=ratio)
    widths = [(m.encoder.embed_dim, m.decoder.embed.out_features) for m in (student, teacher)]
    predict = [_mlp(*sizes, _named(own, f"{head}.")) for *sizes, head in zip(*widths, heads, strict=True)]
    out = student.forward_intermediates(images, noise)[1]
    keep = out["keep"]

    def run(vit: Any) -> tuple[Tensor, list[Tensor]]:
        """The last block's output before the norm, and the nine relations of queries, keys and values."""
        x, last = vit.blocks[:-1](visible_tokens(vit, images, keep)), vit.blocks[-1]
        qkv = last.attn.qkv(last.norm1(x)).unflatten(2, (3, facts["relation_heads"], -1)).permute(2, 0, 3, 1, 4)
        return last(x), [a @ b.mT * a.shape[-1] ** -0.5 for a in qkv for b in qkv]

    (seen, relations), (tokens, student_relations) = run(teacher.encoder), run(student.encoder)
    latent = teacher.encoder.norm(seen)
    target = _norm(teacher.decoder.hidden(latent, keep, facts["teacher_decoder_block"]))
    target_encoder, z = _norm(seen), student.encoder.norm(tokens)
    predicted_encoder, predicted = predict[0](z), predict[1](student.decoder.hidden(z, keep))
    divergences = [
        F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
        for t, s in zip(relations, student_relations, strict=True)
    ]
    found = {
        "mask": out["hidden"],
        "student_encoder_pred": predicted_encoder,
        "target_encoder": target_encoder,
        "loss_encoder": F.smooth_l1_loss(predicted_encoder, target_encoder, beta=2.0),
        "student_decoder_pred": predicted,
        "target_decoder": target,
        "loss_decoder": F.smooth_l1_loss(predicted, target, beta=2.0),
        "relation_loss": torch.stack(divergences).mean(),
    }
    return _parts(found, facts["parts"])


@torch.no_grad()
def dmae(case: Case) -> dict[str, Tensor]:
    """Masked modelling of pixels, and one block's features as a teacher's, both of unit length, by L1."""
    facts, start = case.facts["settings"], "aligned_feature_projection_heads.0."
    own, images, inner = _named(case.state, "student."), case.input("image"), list[Tensor]()
    heads, sizes = facts["teacher"]["heads"], {name: facts["student"][name] for name in ("heads", "decoder_heads")}
    teacher = ViT.from_official(_named(case.state, "teacher."), heads)
    options = {"mask_ratio": facts["mask_ratio"], "normalise": facts["normalise"]}
    student = MAE.from_official(_named(own, "", start), **sizes, **options)
    head = _mlp(student.encoder.embed_dim, teacher.width, _named(own, start))
    block = student.encoder.blocks[facts["student"]["aligned_block"]]
    block.register_forward_hook(lambda module, inputs, output: inner.append(output))
    pixel, out = student.forward_intermediates(images, case.input("mask_noise"))
    (seen,) = teacher.hidden(images, (facts["teacher"]["aligned_block"],), out["keep"])
    found = {
        "ids_keep": out["keep"],
        "teacher_block": seen,
        "pred": out["pixels"],
        "loss_pixel": pixel,
        "loss_embedding": F.l1_loss(F.normalize(head(inner[0]), dim=-1), F.normalize(seen, dim=-1)),
    }
    return _parts(found, facts["parts"])


@torch.no_grad()
def tinymim(case: Case) -> dict[str, Tensor]:
    """Nothing is masked; the student's last block learns the relations of the teacher's, with as many heads."""
    heads, found, relations = case.facts["settings"], {}, {}
    vits = {name: ViT.from_official(_named(case.state, f"{name}."), heads[name]) for name in ("teacher", "student")}
    for name, vit in vits.items():
        x, last = vit.blocks[:-1](visible_tokens(vit, case.input("image"))), vit.blocks[-1]
        qkv = last.attn.qkv(last.norm1(x)).unflatten(2, (3, vits["teacher"].blocks[-1].attn.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, d)
        relations[name] = {"qk": q @ k.mT / q.shape[-1] ** 0.5, "vv": v @ v.mT / v.shape[-1] ** 0.5}
        found |= {f"{name}_{kind}_row": maps[0, :, 0].softmax(-1) for kind, maps in relations[name].items()}
    for kind, own in relations["student"].items():
        target = relations["teacher"][kind].log_softmax(-1)
        divergence = F.kl_div(own.log_softmax(-1), target, reduction="none", log_target=True)
        found[f"loss_{kind}"] = divergence.sum(-1).mean()
    return found | {"loss": found["loss_qk"] + found["loss_vv"]}
