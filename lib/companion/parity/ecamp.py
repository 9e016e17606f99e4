"""ECAMP: the cases recorded from ToniChopp/ECAMP at d02d16d."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import BadParameter
from ..metrics import radiology
from ..models import ecamp, ecamp_heads, ecamp_text
from ..models.ecamp import ECAMP, Batch, Fusion
from . import Case


def outputs(case: Case) -> dict[str, Tensor]:
    """The recorded quantities of any ECAMP case, by our code, in the order of the forward pass."""
    kinds = {"model": _model, "fusion": _fusion, "image_losses": _image, "position": _positions,
             "attention_map": _attention, "text_masking": _text, "classifier": _classifier,
             "segmenter": _segmenter, "detector": _detector, "small_losses": _losses}  # fmt: skip
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


def _classifier(case: Case) -> dict[str, Tensor]:
    model, tokens = ecamp_heads.classifier_from_official(case.state), {}
    for i in (0, 5, 11):
        model.blocks[i].register_forward_hook(lambda module, given, out, i=i: tokens.update({i: out}))
    x = model.forward_features(case.values("input:image", 2, 3, 224, 224))
    blocks = {f"block{i}[:,::14,::8]": out[:, ::14, ::8] for i, out in tokens.items()}
    return blocks | {"features": model.forward_head(x, pre_logits=True), "logits": model.forward_head(x)}


def _segmenter(case: Case) -> dict[str, Tensor]:
    model, steps = ecamp_heads.Segmenter.from_official(case.state), []
    x = model.map(case.values("input:image", 1, 3, 224, 224))
    logits = model.decoders[0](x, steps)
    mask = (case.values("input:mask", 1, 224, 224) > 1).float()
    strides = {1: 2, 2: 4, 3: 8, 4: 8}
    found = {"encoder_map[:,::4]": x[:, ::4]}
    found |= {f"decoder_{i}[:,::16,::{s},::{s}]": steps[i - 1][:, ::16, ::s, ::s] for i, s in strides.items()}
    return found | {
        "logits[:,:,::2,::2]": logits[:, :, ::2, ::2],
        "loss.mixed": ecamp_heads.segmentation_loss(logits, mask[:, None]),
        "loss.focal": ecamp_heads.focal_loss(logits[:, 0], mask),
        "dice_coefficient": ecamp_heads.soft_dice(logits[:, 0], mask),
        "metric.dice": radiology.dice(logits[:, 0].sigmoid(), mask),
    }


def _detector(case: Case) -> dict[str, Tensor]:
    model = ecamp_heads.Detector.from_official(case.state)
    images, boxes = case.values("input:image", 2, 3, 224, 224), case.recorded["in.targets"]
    x = model.map(images)
    coarse, middle, fine = model.pyramid(x)
    heads = model(images)
    pairs = list(zip(heads, model.anchors(), strict=True))
    decoded = torch.cat([ecamp_heads.yolo_decode(head, anchors, 224) for head, anchors in pairs], 1)
    return {
        "encoder_map[:,::8]": x[:, ::8],
        "pyramid28[:,::32,::4,::4]": fine[:, ::32, ::4, ::4],
        "pyramid14[:,::32,::2,::2]": middle[:, ::32, ::2, ::2],
        "pyramid7[:,::32]": coarse[:, ::32],
        "head7": heads[0],
        "head14": heads[1],
        "head28[:,:,::2,::2]": heads[2][:, :, ::2, ::2],
        "losses": torch.stack([torch.stack(ecamp_heads.yolo_loss(x, boxes, a, 224)) for x, a in pairs]),
        "decoded[:,::17]": decoded[:, ::17],
        "nms_counts": torch.tensor([len(found) for found in ecamp_heads.suppress(decoded)]),
    }


def _losses(case: Case) -> dict[str, Tensor]:
    given = {name.removeprefix("in."): value for name, value in case.recorded.items() if name.startswith("in.")}
    logits, mask = given["seg_logits"], given["seg_mask"]
    anchors = torch.tensor(case.facts["config"]["yolo_anchors_px"])
    each = radiology.dice(given["dice_probability"], mask)
    healthy = mask.flatten(1).sum(1) == 0  # they are recorded last
    return {
        "mixed": ecamp_heads.segmentation_loss(logits[:, None], mask[:, None]),
        "focal": ecamp_heads.focal_loss(logits, mask),
        "soft_dice": ecamp_heads.soft_dice(logits, mask),
        "dice_per_image": torch.cat([each[~healthy], each[healthy]]),
        "mlm_loss": ecamp.mlm_loss(given["mlm_logits"], given["mlm_labels"], given["mlm_weights"])[0],
        "yolo_losses": torch.stack(ecamp_heads.yolo_loss(given["yolo_head"], given["yolo_targets"], anchors, 224)),
        "yolo_decoded": ecamp_heads.yolo_decode(given["yolo_head"], anchors, 224),
        "nms_output": ecamp_heads.suppress(given["nms_predictions"])[0],
    }
