"""The recorded outputs of three distillation methods that the reconstruction of DMT builds on, by our code.

    G2SD     the student's decoder predicts the tokens of the teacher's decoder half-way     (Huang et al., CVPR 2023)
    DMAE     the student predicts pixels, and one of its blocks predicts a teacher's         (Bai et al., CVPR 2023)
    TinyMIM  the student's last attention has the teacher's relations between tokens         (Ren et al., CVPR 2023)

Written from scratch, checked against outputs recorded from pengzhiliang/G2SD at 6146adf, UCSC-VLAA/DMAE at a0f4959 and
OliverRensu/TinyMIM at d084705. `companion.models.dmt.parity` loads this file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from tests.parity.legacy import Case
from companion.models.dmt.model import relation_loss, relation_maps
from companion.models.dmt.teachers import MAE
from companion.models.dmt.vit import ViT, visible
from companion.models.layers.mae import random_mask
from companion.models.layers.state_dicts import load_official

Inputs = Callable[[str], Tensor]
Part = Callable[[Case, str, Tensor, int], Tensor]


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


def _heads(facts: object, usual: int | None = None) -> int | None:
    """Heads of an encoder in case.json: of a dict, or of a text with (width, depth, heads)."""
    if isinstance(facts, Mapping):
        return facts.get("heads", facts.get("num_heads", usual))
    found = re.search(r"\(\d+, *\d+, *(\d+)\)", str(facts))
    return int(found[1]) if found else usual


def _autoencoder(state: Mapping[str, Tensor], facts: object, ratio: float) -> MAE:
    """A masked autoencoder; its decoder has the heads of case.json, or one for 32 channels, as all of G2SD's do."""
    heads = len(state["decoder_embed.weight"]) // 32
    if isinstance(facts, Mapping):
        heads = facts.get("decoder_heads", facts.get("decoder_num_heads", heads))
    elif found := re.search(r"decoder.* (\d+) heads", str(facts)):
        heads = int(found[1])
    model = MAE.from_official(state, _heads(facts), heads)
    model.mask_ratio = ratio
    return model


def g2sd(case: Case, given: Inputs, part: Part) -> dict[str, Tensor]:
    """Teacher and student, both masked autoencoders, see the same visible patches; of the teacher's decoder blocks only
    the first are run. The released loss is that of the decoder; of the other two one has weight 0, one is never
    called."""
    config = case.facts["config"]
    own, heads = _named(case.state, "student."), ("encoderfeature_pred", "decoderfeature_pred")
    teacher = _autoencoder(_named(case.state, "teacher."), config["teacher"], config["mask_ratio"])
    student = _autoencoder(_without(_without(own, heads[0]), heads[1]), config["student"], config["mask_ratio"])
    widths = [(m.encoder.width, m.decoder.embed.out_features) for m in (student, teacher)]
    predict = [_mlp(*sizes, _named(own, f"{head}.")) for *sizes, head in zip(*widths, heads, strict=True)]
    images, noise = given("image"), given("mask_noise")
    keep, hidden = random_mask(noise, visible(student.encoder.patches, student.mask_ratio))

    def run(vit: ViT) -> tuple[Tensor, list[Tensor]]:
        """The last block's output before the norm, and the nine relations of queries, keys and values."""
        x = vit.hidden(images, (-2,), keep)[0]
        qkv = vit.qkv(x).transpose(2, 3).flatten(3).unflatten(3, (config.get("relation_heads", 4), -1)).transpose(2, 3)
        return vit.blocks[-1](x), [a @ b.mT * a.shape[-1] ** -0.5 for a in qkv for b in qkv]

    (seen, relations), (tokens, student_relations) = run(teacher.encoder), run(student.encoder)
    first = config["teacher_decoder_block"]
    target, target_encoder = _norm(teacher.decoder.hidden(teacher.encoder.norm(seen), keep, first)), _norm(seen)
    z = student.encoder.norm(tokens)
    predicted_encoder, predicted = predict[0](z), predict[1](student.decoder.hidden(z, keep))
    divergences = [
        F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
        for t, s in zip(relations, student_relations, strict=True)
    ]
    return {
        "mask": hidden,
        "student_encoder_pred": part(case, "student_encoder_pred", predicted_encoder, 4),
        "target_encoder": part(case, "target_encoder", target_encoder, 4),
        "loss_encoder": F.smooth_l1_loss(predicted_encoder, target_encoder, beta=2.0),
        "student_decoder_pred": part(case, "student_decoder_pred", predicted, 4),
        "target_decoder": part(case, "target_decoder", target, 4),
        "loss_decoder": F.smooth_l1_loss(predicted, target, beta=2.0),
        "relation_loss": torch.stack(divergences).mean(),
    }


def dmae(case: Case, given: Inputs, part: Part) -> dict[str, Tensor]:
    """Masked modelling of pixels, and one block's features as a teacher's, both of unit length, by L1."""
    config, start = case.facts["config"], "aligned_feature_projection_heads.0."
    own, trace, inner = _named(case.state, "student."), {}, []
    teacher = ViT.from_official(_named(case.state, "teacher."), _heads(config["teacher"]))
    student = _autoencoder(_without(own, start), config["student"], config["mask_ratio"])
    student.normalise = config.get("norm_pix_loss", False)
    head = _mlp(student.encoder.width, teacher.width, _named(own, start))
    block = student.encoder.blocks[config["student"]["aligned_block"]]
    with block.register_forward_hook(lambda module, inputs, output: inner.append(output)):
        pixel = student(given("image"), given("mask_noise"), trace)
    seen = teacher.hidden(given("image"), (config["teacher"]["aligned_block"],), trace["keep"])[0]
    return {
        "ids_keep": trace["keep"],
        "teacher_block": seen,
        "pred": part(case, "pred", trace["pixels"], 4),
        "loss_pixel": pixel,
        "loss_embedding": F.l1_loss(F.normalize(head(inner[0]), dim=-1), F.normalize(seen, dim=-1)),
    }


def tinymim(case: Case, given: Inputs, part: Part) -> dict[str, Tensor]:
    """Nothing is masked; the student's last block learns the relations of the teacher's, with as many heads."""
    config, own = case.facts["config"], _named(case.state, "student.")
    teacher = ViT.from_official(_named(case.state, "teacher."), _heads(config["teacher"]))
    usual = own["cls_token"].shape[-1] // 32
    student = ViT.from_official(own, _heads(config["student"], usual), last_heads=teacher.heads)
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
