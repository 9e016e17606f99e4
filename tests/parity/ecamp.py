"""ECAMP: the cases recorded from ToniChopp/ECAMP at d02d16d."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from companion.evaluation.metrics import radiology
from .legacy import Case, run
from companion.models.layers.mae import patchify, random_mask, unpatchify
from companion.models.layers.pos_embed import sincos_table
from companion.models.layers.state_dicts import load_official
from companion.models.ecamp import heads, text
from companion.models.ecamp import model as ecamp
from companion.models.ecamp.model import ECAMP, Batch, Fusion


def outputs(case: Case) -> dict[str, Tensor]:
    """The recorded quantities of any ECAMP case, by our code, in the order of the forward pass."""
    kinds = {
        "model": _model,
        "fusion": _fusion,
        "image_losses": _image,
        "position": _positions,
        "attention_map": _attention,
        "text_masking": _text,
        "classifier": _classifier,
        "segmenter": _segmenter,
        "detector": _detector,
        "small_losses": _losses,
    }
    with torch.no_grad():
        return _cut(case, run(kinds, case))


def recorded(case: Case) -> dict[str, Tensor]:
    """The recorded outputs of a case, without its stored inputs."""
    return {name: value for name, value in case.recorded.items() if not name.startswith("in.")}


def _cut(case: Case, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """The recorded part of `whole`, given by a name like "latent[:,:,::4]"."""
    names: dict[str, list[str]] = {}
    for name in recorded(case):
        names.setdefault(name.partition("[")[0], []).append(name)
    found = {}
    for base, value in whole.items():
        for name in names.get(base, ()):
            axes = name.partition("[")[2].rstrip("]").split(",") if "[" in name else []
            numbers = ([int(n) if n else None for n in axis.split(":")] for axis in axes)
            found[name] = value[tuple(slice(*n) for n in numbers)]
    return found


def _heads(case: Case, *names: str) -> int | None:
    """The attention heads under the first of `names` that the configuration has; None: 64 channels per head."""
    config = case.facts.get("config", {})
    return next((config[name] for name in (*names, "num_attention_heads", "num_heads") if name in config), None)


def _corners(case: Case) -> Tensor:
    return torch.tensor([case.facts["inputs"]["column"], case.facts["inputs"]["row"]]).T


def _model(case: Case) -> dict[str, Tensor]:
    config, given = case.facts["config"], case.recorded
    bert = config["bert"]
    model = ECAMP.from_official(
        case.state,
        heads=config["heads"],
        decoder_heads=config["decoder_heads"],
        text_heads=bert.get("heads") or bert["num_attention_heads"],
        window=config.get("window", 12),
    )
    batch = Batch(
        case.input("image"),
        given["in.ids"],
        given["in.labels"],
        given["in.attention_mask"],
        given["in.weights"],
        case.input("mask_noise"),
        _corners(case),
    )
    trace: dict[str, Tensor] = {}
    losses = model(batch, trace)
    return {
        "image224": trace["low"],
        "ids_keep": trace["keep"],
        "latent": trace["latent"],
        "pred": trace["pixels"],
        "super_res": trace["super_resolved"],
        "text_embeddings": trace["embedded"],
        "fusion": trace["fused"],
        "logits": trace["logits"],
        "mlm_per_token": trace["cross_entropy"],
        "loss.mim": losses.mim,
        "loss.res": losses.sr,
        "loss.mlm": losses.mlm,
        "loss.total": losses.total,
    }


def _fusion(case: Case) -> dict[str, Tensor]:
    config = case.facts["config"]
    sizes = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    # the layer alone, its tensors under their names in the full model
    start = "bert_encoder.model.bert.context_fusion_layer."
    names = {
        ours.removeprefix("text.fusion."): official.removeprefix(start)
        for ours, official in ecamp.build("pocket").official_names().items()
        if official.startswith(start)
    }
    layer = Fusion(*sizes, 0.1, "both").eval()
    load_official(layer, case.state, names, "ECAMP's fusion layer")
    hidden, latent = case.input("hidden"), case.input("latent")
    trace: dict[str, Tensor] = {}
    out = layer(hidden, case.recorded["in.attention_mask"].bool()[:, None, None], latent, trace)
    text, channel = config["stride_text"], config["stride_channel"]
    return {
        "self_attention": trace["attended"][:, ::text, ::channel],
        "cross_context": trace["context"][:, ::text, ::channel],
        "cross_probabilities": trace["attention"][:, :, ::text],
        "global_term": trace["global"],
        "after_mix": trace["after_mix"][:, ::text, ::channel],
        "output": out[:, ::text, ::channel],
    }


def _image(case: Case) -> dict[str, Tensor]:
    block, config = ecamp.SuperResolution(), case.facts["config"]
    names = {name: f"super_res.{name}" for name in block.state_dict()}
    load_official(block, case.state, names, "ECAMP's super-resolution block")
    images, pred, noise = case.input("image"), case.input("pred"), case.input("mask_noise")
    patch, low = config["patch"], ecamp.shrink(images)
    hidden = random_mask(noise, int(noise.shape[1] * (1 - ecamp.MASKED)))[1]
    pixels = unpatchify(hidden[..., None].expand_as(pred), patch)
    window = ecamp.windows(_corners(case), config["window"], 2 * patch, images.shape[-1])
    whole = unpatchify(pred, patch)
    resolved = block(whole)
    return {
        "small_out": block(case.input("small")),
        "unpatchified": whole,
        "sr_of_pred": resolved,
        "token_mask": hidden,
        "pixel_mask_rowsum": pixels[:, 0].sum(-1),
        "window_mask_rowsum": window[:, 0].sum(-1),
        "window_mask_colsum": window[:, 0].sum(-2),
        "loss.mim": ecamp.mim_loss(pred, patchify(low, patch), hidden),
        "loss.res": ecamp.sr_loss(resolved, images, window),
        "share_of_negative_targets": (images < 0).float().mean(),
    }


def _positions(case: Case) -> dict[str, Tensor]:
    found = {}
    for name in case.recorded:
        kind, width, side = name.partition("[")[0].split("_")
        found[name.partition("[")[0]] = sincos_table(int(width), int(side), kind)[0]
    return found


def _attention(case: Case) -> dict[str, Tensor]:
    config, given = case.facts["config"], case.recorded
    model = ECAMP.from_official(
        case.state, heads=config.get("vit_heads"), decoder_heads=config.get("decoder_heads"), text_heads=config["heads"]
    )
    images = case.input("image")
    maps = model.attention(images, given["in.ids"], given["in.attention_mask"])
    raster = maps[0, :, config["token_index"]]
    order = case.input("mask_noise")[0].argsort()
    shuffled = raster[:, order]  # the encoder is invariant to the order of the patches
    return {
        "attention_shuffled": shuffled,
        "attention_raster": raster,
        "ids_restore": order.argsort(),
        "heat_as_in_code": ecamp.heat(shuffled),
        "heat_raster": ecamp.heat(raster),
        "heat_raster_up": ecamp.heat(raster, images.shape[-1]),
    }


def _text(case: Case) -> dict[str, Tensor]:
    words = text.Vocabulary.from_words(case.facts["inputs"]["vocabulary"])
    length = case.facts["config"]["length"]
    found: dict[str, list] = {"ids": [], "masked_ids": [], "weights": []}
    for example in case.facts["examples"]:
        ids = words.encode(example["text"].replace(" ##", ""), length)
        draws = iter(example["draws_used"])
        found["ids"].append(ids)
        found["masked_ids"].append(text.mask(ids, words, draws.__next__))
        found["weights"].append(text.weights(ids, words))
    return {name: torch.from_numpy(np.stack(rows)) for name, rows in found.items()}


def _classifier(case: Case) -> dict[str, Tensor]:
    model, tokens = heads.classifier_from_official(case.state, _heads(case, "heads")), {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, given, out, i=i: tokens.update({f"block{i}": out}))
    x = model.forward_features(case.input("image"))
    return tokens | {"features": model.forward_head(x, pre_logits=True), "logits": model.forward_head(x)}


def _segmenter(case: Case) -> dict[str, Tensor]:
    """One decoder, with any number of classes, whose loss is over all of them at once; or RIGA's two."""
    model = heads.Segmenter.from_official(case.state, _heads(case, "heads"))
    steps: list[Tensor] = []
    x = model.map(case.input("image"))
    each = [decoder(x, steps) for decoder in model.decoders]
    logits, mask = torch.cat(each, 1), (case.input("mask") > 1).float()
    if mask.numel() != logits.numel():
        mask = mask[:, None].expand_as(logits)
    # a decoder's logits and mask as one map, whatever its classes
    flat, truth = (t.reshape(len(t), len(each), -1) for t in (logits, mask))
    found = {"encoder_map": x} | {f"decoder_{i}": step for i, step in enumerate(steps, 1)}
    if len(each) == 2:
        found |= {"logits_disc": each[0], "logits_cup": each[1]}
    return found | {
        "logits": logits,
        "loss.mixed": heads.segmentation_loss(flat, truth),
        "loss.focal": heads.focal_loss(flat, truth),
        "dice_coefficient": heads.soft_dice(flat, truth),
        "metric.dice": radiology.dice(flat.sigmoid(), truth),
    }


def _detector(case: Case) -> dict[str, Tensor]:
    model = heads.Detector.from_official(case.state, _heads(case, "heads"))
    images, boxes, size = case.input("image"), case.recorded["in.targets"], model.size
    x = model.map(images)
    levels, outputs = model.pyramid(x), model(images)
    pairs = list(zip(outputs, model.anchors(), strict=True))
    decoded = torch.cat([heads.yolo_decode(head, anchors, size) for head, anchors in pairs], 1)
    found = {"encoder_map": x} | {f"pyramid{level.shape[-1]}": level for level in levels}
    return (
        found
        | {f"head{head.shape[-1]}": head for head in outputs}
        | {
            "losses": torch.stack([torch.stack(heads.yolo_loss(x, boxes, a, size)) for x, a in pairs]),
            "decoded": decoded,
            "nms_counts": torch.tensor([len(kept) for kept in heads.suppress(decoded)]),
        }
    )


def _losses(case: Case) -> dict[str, Tensor]:
    given = {name.removeprefix("in."): value for name, value in case.recorded.items() if name.startswith("in.")}
    logits, mask, config = given["seg_logits"], given["seg_mask"], case.facts["config"]
    anchors, size = torch.tensor(config["yolo_anchors_px"]), config["image"]
    each = radiology.dice(given["dice_probability"], mask)
    healthy = mask.flatten(1).sum(1) == 0  # they are recorded last
    kept = heads.suppress(given["nms_predictions"], config["confidence"], config["nms_iou"])
    return {
        "mixed": heads.segmentation_loss(logits[:, None], mask[:, None]),
        "focal": heads.focal_loss(logits, mask),
        "soft_dice": heads.soft_dice(logits, mask),
        "dice_per_image": torch.cat([each[~healthy], each[healthy]]),
        "mlm_loss": ecamp.mlm_loss(given["mlm_logits"], given["mlm_labels"], given["mlm_weights"])[0],
        "yolo_losses": torch.stack(heads.yolo_loss(given["yolo_head"], given["yolo_targets"], anchors, size)),
        "yolo_decoded": heads.yolo_decode(given["yolo_head"], anchors, size),
        "nms_output": kept[0],
    }
