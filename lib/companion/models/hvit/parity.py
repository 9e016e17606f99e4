"""H-ViT: the cases recorded from computationalpathologygroup/hvit at 444bb72, and from clemsgrs/hs2p at f51b276."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import cohen_kappa_score, confusion_matrix, roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from ... import slides
from ...evaluation import fill
from ...evaluation.parity import Case, run
from ...viz import heatmaps
from ..layers import dino
from . import model as hvit
from .model import HViT, PatchEncoder, RegionEncoder


def outputs(case: Case) -> dict[str, Tensor]:
    """The recorded quantities of any H-ViT case, by our code, in the order of the forward pass."""
    kinds = {
        "vit_patch": _encoder,
        "vit_region": _encoder,
        "slide": _slide,
        "local": _local,
        "hipt": _pixels,
        "losses": _losses,
        "metrics": _metrics,
        "dino": _dino,
        "tiling": _tiling,
        "heatmap": _heatmap,
    }
    return run(kinds, case)


def recorded(case: Case) -> dict[str, Tensor]:
    """What the case recorded; the norms of gradients, one array in the file, by the tensors' names."""
    found = dict(case.recorded)
    if (norms := found.pop("grad_norms", None)) is not None:
        found |= _norms(dict(zip(case.names, norms, strict=True)))
    return found


def _norms(norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Norms of gradients by "grad:<name>". A softmax does not see a bias of its scores: what is rounding is 0."""
    rounding = 1e-6 * max(norms.values())
    return {f"grad:{name}": norm if norm > rounding else torch.zeros(()) for name, norm in norms.items()}


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of the authors' or HIPT's checkpoint."""
    return hvit.read_checkpoint(path)


def _share(case: Case, *shape: int) -> Tensor:
    """Shares of tissue: standard normal values, cut off at 0 and 1."""
    return case.values("input:pct", *shape).clamp(0, 1)


@torch.no_grad()
def _encoder(case: Case) -> dict[str, Tensor]:
    kind = PatchEncoder if case.name.startswith("vit_patch") else RegionEncoder
    encoder, x = kind.from_official(case.state), case.input("x")
    trace: dict[str, Any] = {}
    masked = case.facts["config"]["mask_attn"]
    keep = _share(case, *case.facts["inputs"]["pct"]["shape"]) > 0 if masked else None
    cls = encoder(x, keep, trace)
    channels = 32 if kind is PatchEncoder else 64
    return {
        "pos_embed_interpolated": trace["positions"][..., :channels],
        "tokens": trace["tokens"][:, :16],
        "block0": trace["block0"][:, :16],
        "last_attention_cls_row": trace["attention"],
        "cls": cls,
    }


def _model(case: Case, **options: Any) -> HViT:
    config = case.facts["config"]
    position = None
    if (config.get("slide_pos_embed") or {}).get("use"):
        position = "learned" if config["slide_pos_embed"]["learned"] else "sine"
    return HViT.from_official(case.state, config.get("task", "classification"), position=position, **options)


def _top(trace: Mapping[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
    found = {key: trace[key][0] for key in ("phi", "positioned", "transformer")}
    return found | {"attention": trace["pooling"], "embedding": trace["slide"], "logits": logits}


@torch.no_grad()
def _slide(case: Case) -> dict[str, Tensor]:
    trace: dict[str, Tensor] = {}
    return _top(trace, _model(case)(case.input("x")[None], trace=trace))


def _local(case: Case) -> dict[str, Tensor]:
    model, tissue = _model(case), None
    trace: dict[str, Any] = {}
    if case.facts["config"]["mask_attn"]:
        tissue = _share(case, *case.facts["inputs"]["pct"]["shape"][:2], 1)[None]
    logits = model(case.input("x")[None], tissue=tissue, trace=trace)
    found = {"region_embeddings": trace["regions"][0]} | _top(trace, logits)
    if "mse_loss" in case.recorded:
        found["mse_loss"] = hvit.loss("regression", logits, torch.tensor([3]))
        found["mse_loss"].backward()
        names = model.official_names()
        gradients = {names[name]: p.grad for name, p in model.named_parameters()}
        first = {
            "vit_region.phi.0.weight": np.s_[:16],
            "vit_region.pos_embed": np.s_[:, :9],
            "global_attn_pool.attention_c.weight": np.s_[:],
            "classifier.weight": np.s_[:],
        }
        found |= {f"grad.{name}": gradients[name][part] for name, part in first.items()}
        found |= _norms({name: gradients[name].norm() for name in case.names})
    return found


@torch.no_grad()
def _pixels(case: Case) -> dict[str, Tensor]:
    trace: dict[str, Tensor] = {}
    logits = _model(case)(case.input("x")[None], trace=trace)
    return {"patch_embeddings": trace["patches"][0, :, :16], "region_embeddings": trace["regions"][0]} | _top(
        trace, logits
    )


def _grades(case: Case, count: int) -> Tensor:
    return (1.5 * case.values("input:label", count) + 2.5).round().clamp(0, 5).long()


def _losses(case: Case) -> dict[str, Tensor]:
    logits, ordinal = case.input("logits"), case.input("ordinal_logits")
    regression, grades = 2 * case.input("regression_logits") + 2.5, _grades(case, 8)
    heads = {
        "cross_entropy": ("classification", logits),
        "mse": ("regression", regression),
        "ordinal_bce": ("ordinal", ordinal),
        "coral": ("coral", ordinal),
        "corn": ("corn", ordinal),
    }
    found = {"labels": grades, "ordinal_labels": hvit.extended(grades, 6)}
    found |= {name: hvit.loss(head, out, grades) for name, (head, out) in heads.items()}
    predicted = {
        "argmax": ("classification", logits),
        "ordinal": ("ordinal", ordinal),
        "corn": ("corn", ordinal),
        "regression": ("regression", regression),
    }
    return found | {f"pred_{name}": hvit.predict(head, out) for name, (head, out) in predicted.items()}


def _metrics(case: Case) -> dict[str, Tensor]:
    grades = _grades(case, 200).cpu()
    predicted = (grades + 0.9 * case.values("input:noise", 200).cpu()).round().clamp(0, 5).long()
    logits = case.values("input:logits", 200, 6).cpu().double() + 2 * F.one_hot(grades, 6)
    votes = (1.2 * case.values("input:votes", 60, 5) + 2.5).round().clamp(0, 5).long()
    each = [[hvit.vote(row, isup=isup, seed=i) for isup in (False, True)] for i, row in enumerate(votes.tolist())]
    return {
        "labels": grades,
        "preds": predicted,
        "quadratic_kappa": torch.tensor(cohen_kappa_score(grades, predicted, weights="quadratic")),
        "auc_ovr": torch.tensor(roc_auc_score(grades, logits.softmax(1), multi_class="ovr")),
        "confusion": torch.from_numpy(confusion_matrix(grades, predicted)),
        "votes": votes,
        "vote_result": torch.tensor(each),
    }


@torch.no_grad()
def _dino(case: Case) -> dict[str, Tensor]:
    found = {"head": dino.Head.from_official(case.state)(case.input("x"))[:, :256]}
    loss = dino.Loss(512)
    for i in (0, 1):
        found[f"loss_epoch{i}"] = loss(case.input("student"), case.input("teacher"), 10)
        found[f"center_after{i + 1}"] = loss.centre.clone()
    for name, ends, warmup in (("lr", (5e-4, 1e-6), 4), ("wd", (0.04, 0.4), 0), ("momentum", (0.996, 1.0), 0)):
        found[f"{name}_schedule"] = torch.from_numpy(dino.cosine(*ends, 20, 5, warmup))
    return found


def _tiling(case: Case) -> dict[str, Tensor]:
    config, thumbnail = case.facts["config"], case.recorded["thumbnail"].cpu()
    tiling = slides.Tiling(
        region=config["tile"],
        mpp=config["target_spacing"],
        downsample=config["seg_downsample"],
        saturation=config["seg"]["sthresh"],
        otsu=config["seg"]["use_otsu"],
        median=config["seg"]["mthresh"],
        close=config["seg"]["close"],
        area=config["filter"]["a_t"],
        hole_area=config["filter"]["a_h"],
        holes=config["filter"]["max_n_holes"],
        drop_holes=config["drop_holes"],
        least=config["tissue_thresh"],
        padding=config["use_padding"],
    )
    mask = slides.tissue_mask(thumbnail.numpy(), tiling)
    ratio = config["target_spacing"] / config["spacing0"]
    coords, shares, contours = slides.find_tiles(
        mask, config["seg_downsample"], tuple(config["level0"]), int(config["tile"] * ratio), tiling, 256 * ratio
    )
    found = {"thumbnail": thumbnail.numpy(), "mask": mask, "coords": coords, "contour": contours, "tissue_pct": shares}
    found["coords_file_order"] = coords[slides.file_order(coords)]
    return {name: torch.from_numpy(value) for name, value in found.items()}


@torch.no_grad()
def _heatmap(case: Case) -> dict[str, Tensor]:
    names, config = case.names, case.facts["config"]
    state = {
        level: {n: torch.as_tensor(a) for n, a in fill.state_dict(own, case.seed).items()}
        for level, own in names.items()
    }
    # the heatmap's slide model ends at the slide's embedding
    top = HViT.from_official(
        state["slide"] | {"classifier.weight": torch.zeros(6, 192), "classifier.bias": torch.zeros(6)}, "classification"
    ).slide
    model = HViT(top, RegionEncoder.from_official(state["region"]), PatchEncoder.from_official(state["patch"]))
    inputs = case.facts["inputs"]
    places = [re.findall(r"saved as (\d+)_(\d+)", facts["recipe"])[0] for facts in inputs.values()]
    coords = np.array([[int(n) for n in place] for place in places])
    order = slides.file_order(coords)
    given = [case.values(f"input:{list(inputs)[i]}", 1024, 1024, 3) for i in order]
    regions = np.stack([(48 * x + 128).round().clamp(0, 255).byte().cpu().numpy() for x in given])
    smooth, side = config["smoothing_region_and_patch"], 1024 // config["downscale"]
    step = config["smoothing_region_offset"] * 1024 // 4096 if smooth else 0  # pixels of a region
    patch, region = [], []  # by shift: all regions' maps
    for k in range(4 if smooth else 1):
        trace: dict[str, Tensor] = {}
        offset = k * step
        moved = np.pad(regions[:, offset:, offset:], ((0, 0), (0, offset), (0, offset), (0, 0)), constant_values=255)
        with torch.device("cpu"):
            pixels = slides.tensor(moved, "half")[None]
        model(pixels.to(torch.get_default_device()), trace=trace)
        seen = {key: value[0].cpu().numpy() for key, value in trace.items()}
        if k <= 1:  # the patch maps are shifted once, the region maps three times
            patch.append([heatmaps.patch_map(a) for a in seen["patch_attention"]])
        region.append([heatmaps.region_map(a, side) for a in seen["region_attention"]])
        if not k:
            first = seen
    share = heatmaps.ranks(first["pooling"], axes=1)
    found = {
        "patch_attention": first["patch_attention"][0],
        "region_attention": first["region_attention"][0],
        "slide_attention": share,
        "coords": coords[order],
        "region_score_head0": heatmaps.ranks(first["region_attention"][0])[0],
        "patch_score_head0": patch[0][0][0],
    }
    for variant, gamma in config["combos"]:
        scores = [
            heatmaps.granular(
                [p[i][low] for p in patch],
                [r[i][high] for r in region],
                share[i],
                step // config["downscale"],
                gamma,
                variant,
                official_quirks=smooth,
            )
            for i, high, low in ((0, 0, 0), (1, 2, 5))
        ]
        found[f"blend_{variant}_gamma{gamma}"] = np.stack(scores)
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found.items()}
