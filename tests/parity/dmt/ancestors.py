"""The recorded outputs of three distillation methods that the reconstruction of DMT builds on, by our code.

    G2SD     the student's decoder predicts the tokens of the teacher's decoder half-way     (Huang et al., CVPR 2023)
    DMAE     the student predicts pixels, and one of its blocks predicts a teacher's         (Bai et al., CVPR 2023)
    TinyMIM  the student's last attention has the teacher's relations between tokens         (Ren et al., CVPR 2023)

Written from scratch, checked against outputs recorded from pengzhiliang/G2SD at 6146adf, UCSC-VLAA/DMAE at a0f4959 and
OliverRensu/TinyMIM at d084705. `companion.models.dmt.parity` loads this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from companion.evaluation.parity import Case
from companion.models.dmt.model import relation_loss, relation_maps
from companion.models.dmt.teachers import MAE
from companion.models.dmt.vit import ViT, visible
from companion.models.layers.mae import random_mask
from companion.models.layers.state_dicts import load_official

Inputs = Callable[[str], Tensor]


def _named(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors after a prefix."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _without(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith(prefix)}


def _mlp(inputs: int, outputs: int, state: Mapping[str, Tensor]) -> nn.Module:
    head = Mlp(inputs, outputs, outputs)
    load_official(head, state, {name: name for name in head.state_dict()}, "a head")
    return head


def _norm(tokens: Tensor) -> Tensor:
    """LayerNorm without affine, eps 1e-6."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)


def g2sd(case: Case, given: Inputs) -> dict[str, Tensor]:
    """Teacher and student, both masked autoencoders, see the same visible patches; of the teacher's 8 decoder blocks 4
    are run. The released loss is that of the decoder; of the other two one has weight 0, one is never called."""
    own, heads = _named(case.state, "student."), ("encoderfeature_pred", "decoderfeature_pred")
    teacher = MAE.from_official(_named(case.state, "teacher."), decoder_heads=16)
    student = MAE.from_official(_without(_without(own, heads[0]), heads[1]), decoder_heads=8)
    widths = [(m.encoder.width, m.decoder.embed.out_features) for m in (student, teacher)]
    predict = [_mlp(*sizes, _named(own, f"{head}.")) for *sizes, head in zip(*widths, heads, strict=True)]
    images, noise = given("image"), given("mask_noise")
    keep, hidden = random_mask(noise, visible(student.encoder.patches, student.mask_ratio))

    def run(vit: ViT) -> tuple[Tensor, list[Tensor]]:
        """The last block's output before the norm, and the nine relations of queries, keys and values in 4 heads."""
        x = vit.hidden(images, (-2,), keep)[0]
        qkv = vit.qkv(x).transpose(2, 3).flatten(3).unflatten(3, (4, -1)).transpose(2, 3)
        return vit.blocks[-1](x), [a @ b.mT * a.shape[-1] ** -0.5 for a in qkv for b in qkv]

    (seen, relations), (tokens, student_relations) = run(teacher.encoder), run(student.encoder)
    target, target_encoder = _norm(teacher.decoder.hidden(teacher.encoder.norm(seen), keep, 4)), _norm(seen)
    z = student.encoder.norm(tokens)
    predicted_encoder, predicted = predict[0](z), predict[1](student.decoder.hidden(z, keep))
    divergences = [
        F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
        for t, s in zip(relations, student_relations, strict=True)
    ]
    return {
        "mask": hidden,
        "student_encoder_pred": predicted_encoder[:, ::4, :64],
        "target_encoder": target_encoder[:, ::4, :64],
        "loss_encoder": F.smooth_l1_loss(predicted_encoder, target_encoder, beta=2.0),
        "student_decoder_pred": predicted[:, ::4, :64],
        "target_decoder": target[:, ::4, :64],
        "loss_decoder": F.smooth_l1_loss(predicted, target, beta=2.0),
        "relation_loss": torch.stack(divergences).mean(),
    }


def dmae(case: Case, given: Inputs) -> dict[str, Tensor]:
    """Masked modelling of pixels, and one block's features as a teacher's, both of unit length, by L1."""
    config, start = case.facts["config"], "aligned_feature_projection_heads.0."
    own, trace, inner = _named(case.state, "student."), {}, []
    teacher = ViT.from_official(_named(case.state, "teacher."))
    student = MAE.from_official(_without(own, start), decoder_heads=4)
    student.normalise = False
    head = _mlp(student.encoder.width, teacher.width, _named(own, start))
    block = student.encoder.blocks[config["student"]["aligned_block"]]
    with block.register_forward_hook(lambda module, inputs, output: inner.append(output)):
        pixel = student(given("image"), given("mask_noise"), trace)
    seen = teacher.hidden(given("image"), (config["teacher"]["aligned_block"],), trace["keep"])[0]
    return {
        "ids_keep": trace["keep"],
        "teacher_block": seen,
        "pred": trace["pixels"][:, ::4, :64],
        "loss_pixel": pixel,
        "loss_embedding": F.l1_loss(F.normalize(head(inner[0]), dim=-1), F.normalize(seen, dim=-1)),
    }


def tinymim(case: Case, given: Inputs) -> dict[str, Tensor]:
    """Nothing is masked; the student's last block learns the relations of the teacher's, with as many heads."""
    teacher = ViT.from_official(_named(case.state, "teacher."))
    student = ViT.from_official(_named(case.state, "student."), 6, last_heads=teacher.heads)
    vits = {"teacher": teacher, "student": student}
    qkv = {name: vit.qkv(vit.hidden(given("image"), (-2,))[0]) for name, vit in vits.items()}
    rows = {
        f"{name}_{kind}_row": maps[0, :, 0].softmax(-1)
        for name, own in qkv.items()
        for kind, maps in zip(("qk", "vv"), relation_maps(own), strict=True)
    }
    qk, vv = relation_loss(qkv["student"], qkv["teacher"])
    return rows | {"loss_qk": qk, "loss_vv": vv, "loss": qk + vv}


CASES = {"g2sd": g2sd, "dmae": dmae, "tinymim": tinymim}
