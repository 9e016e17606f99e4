"""ECAMP: the cases recorded from ToniChopp/ECAMP at d02d16d."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import BadParameter
from ..models import ecamp, ecamp_text
from ..models.ecamp import ECAMP, Batch, Fusion
from . import Case


def outputs(case: Case) -> dict[str, Tensor]:
    """The recorded quantities of any ECAMP case, by our code, in the order of the forward pass."""
    kinds = {"model": _model, "fusion": _fusion, "image_losses": _image, "position": _positions,
             "attention_map": _attention, "text_masking": _text}  # fmt: skip
    for start, run in kinds.items():
        if case.name.startswith(start):
            with torch.no_grad():
                return run(case)
    raise BadParameter("case", case.name, list(kinds))


def recorded(case: Case) -> dict[str, Tensor]:
    """What the case recorded; what it stored of the inputs is no output."""
    return {name: value for name, value in case.recorded.items() if not name.startswith("in.")}


def _model(case: Case) -> dict[str, Tensor]:
    config, given = case.facts["config"], case.recorded
    model = ECAMP.from_official(
        case.state, heads=config["heads"], decoder_heads=config["decoder_heads"],
        text_heads=config["bert"].get("heads", config["bert"].get("num_attention_heads")),
    )  # fmt: skip
    corners = torch.tensor([case.facts["inputs"]["column"], case.facts["inputs"]["row"]]).T
    batch = Batch(
        case.values("input:image", 2, 3, 448, 448), given["in.ids"], given["in.labels"], given["in.attention_mask"],
        given["in.weights"], case.values("input:mask_noise", 2, 196), corners,
    )  # fmt: skip
    trace: dict[str, Tensor] = {}
    losses = model(batch, trace)
    small = case.name.startswith("model_small")
    text, words = (4, 10) if small else (16, 300)
    return {
        "image224[:,:,::16,::16]": trace["low"][:, :, ::16, ::16],
        "ids_keep": trace["keep"],
        "latent[:,:,::4]": trace["latent"][:, :, ::4],
        "pred[:,::14,::4]": trace["pixels"][:, ::14, ::4],
        "super_res[:,:,::16,::16]": trace["super_resolved"][:, :, ::16, ::16],
        f"text_embeddings[:,::{text},::4]": trace["embedded"][:, ::text, ::4],
        f"fusion[:,::{text},::4]": trace["fused"][:, ::text, ::4],
        f"logits[:,::{text},::{words}]": trace["logits"][:, ::text, ::words],
        "mlm_per_token": trace["cross_entropy"],
        "loss.mim": losses.mim,
        "loss.res": losses.sr,
        "loss.mlm": losses.mlm,
        "loss.total": losses.total,
    }


def _fusion(case: Case) -> dict[str, Tensor]:
    # the layer by itself, its tensors under the names that the whole model gives them
    model = ecamp.build("pocket", text_width=768, text_heads=6, text_hidden=1536, words=8)
    start = "bert_encoder.model.bert.context_fusion_layer."
    names = {ours.removeprefix("text.fusion."): official.removeprefix(start)
             for ours, official in model.official_names().items() if official.startswith(start)}  # fmt: skip
    layer = Fusion(768, 6, 1536, 0.1, "both").eval()
    ecamp.load_official(layer, case.state, names, "ECAMP's fusion layer")
    hidden, latent = case.values("input:hidden", 2, 64, 768), case.values("input:latent", 2, 49, 768)
    trace: dict[str, Tensor] = {}
    out = layer(hidden, case.recorded["in.attention_mask"].bool()[:, None, None], latent, trace)
    return {
        "self_attention": trace["attended"][:, ::4, ::2],
        "cross_context": trace["context"][:, ::4, ::2],
        "cross_probabilities": trace["attention"][:, :, ::4],
        "global_term": trace["global"],
        "after_mix": trace["after_mix"][:, ::4, ::2],
        "output": out[:, ::4, ::2],
    }


def _image(case: Case) -> dict[str, Tensor]:
    block = ecamp.SuperResolution()
    names = {name: f"super_res.{name}" for name in block.state_dict()}
    ecamp.load_official(block, case.state, names, "ECAMP's super-resolution block")
    images, pred = case.values("input:image", 2, 3, 448, 448), case.values("input:pred", 2, 196, 768)
    low, keep = ecamp.shrink(images), case.values("input:mask_noise", 2, 196).argsort(1)[:, :49]
    hidden = torch.ones(2, 196).scatter(1, keep, 0)
    pixels = ecamp.unpatchify(hidden[..., None].expand(-1, -1, 768), 16)
    config = case.facts["config"]
    corners = torch.tensor([case.facts["inputs"]["column"], case.facts["inputs"]["row"]]).T
    window = ecamp.windows(corners, config["window"], 32, 448)
    whole, resolved = ecamp.unpatchify(pred, 16), block(ecamp.unpatchify(pred, 16))
    return {
        "small_out[:,:,::1,::2]": block(case.values("input:small", 1, 3, 32, 32))[..., ::2],
        "unpatchified[:,:,::16,::8]": whole[:, :, ::16, ::8],
        "sr_of_pred[:,:,::16,::8]": resolved[:, :, ::16, ::8],
        "token_mask": hidden,
        "pixel_mask_rowsum": pixels[:, 0].sum(-1),
        "window_mask_rowsum": window[:, 0].sum(-1),
        "window_mask_colsum": window[:, 0].sum(-2),
        "loss.mim": ecamp.mim_loss(pred, ecamp.patchify(low, 16), hidden),
        "loss.res": ecamp.sr_loss(resolved, images, window),
        "share_of_negative_targets": (images < 0).float().mean(),
    }


def _positions(case: Case) -> dict[str, Tensor]:
    found = {}
    for kind in ("ecamp", "mae"):
        for width in (768, 512):
            found[f"{kind}_{width}_14[::3,::8]"] = ecamp.position_table(width, 14, kind)[0, ::3, ::8]
    return found | {"ecamp_96_7": ecamp.position_table(96, 7)[0]}


def _attention(case: Case) -> dict[str, Tensor]:
    model = ECAMP.from_official(case.state)
    maps = model.attention(case.values("input:image", 1, 3, 224, 224), case.recorded["in.ids"],
                           case.recorded["in.attention_mask"])  # fmt: skip
    raster = maps[0, :, case.facts["config"]["token_index"]]
    order = case.values("input:mask_noise", 1, 196)[0].argsort()
    shuffled = raster[:, order]  # the encoder does not care in which order it sees the patches
    return {
        "attention_shuffled": shuffled,
        "attention_raster": raster,
        "ids_restore": order.argsort(),
        "heat_as_in_code": ecamp.heat(shuffled),
        "heat_raster": ecamp.heat(raster),
        "heat_raster_up[::2,::2]": ecamp.heat(raster, 224)[::2, ::2],
    }


def _text(case: Case) -> dict[str, Tensor]:
    vocabulary, length = (
        ecamp_text.Vocabulary.from_words(case.facts["inputs"]["vocabulary"]),
        case.facts["config"]["length"],
    )
    found: dict[str, list] = {"ids": [], "masked_ids": [], "weights": []}
    for example in case.facts["examples"]:
        ids = vocabulary.encode(example["text"].replace(" ##", ""), length)
        draws = iter(example["draws_used"])
        found["ids"].append(ids)
        found["masked_ids"].append(ecamp_text.mask(ids, vocabulary, draws.__next__))
        found["weights"].append(ecamp_text.weights(ids, vocabulary))
    return {name: torch.from_numpy(np.stack(rows)) for name, rows in found.items()}
