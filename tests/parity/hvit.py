"""H-ViT: the cases recorded from computationalpathologygroup/hvit at 444bb72, and from clemsgrs/hs2p at f51b276."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import cohen_kappa_score, confusion_matrix, roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from companion import slides
from . import fill
from .legacy import Case, run
from companion.viz import heatmaps
from companion.models.layers import dino
from companion.models.hvit import model as hvit
from companion.models.hvit.model import HViT, PatchEncoder, RegionEncoder

ROUNDING = 4e-6  # of attention in float32, relative


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
    """Shares of tissue: standard normal values, clipped at 0 and 1."""
    return case.values("input:pct", *shape).clamp(0, 1)


@torch.no_grad()
def _encoder(case: Case) -> dict[str, Tensor]:
    kind = PatchEncoder if case.name.startswith("vit_patch") else RegionEncoder
    encoder, x = kind.from_official(case.state), case.input("x")
    trace: dict[str, Any] = {}
    masked = case.facts["config"]["mask_attn"]
    keep = _share(case, *case.facts["inputs"]["pct"]["shape"]) > 0 if masked else None
    cls = encoder(x, keep, trace)
    shapes = {name: facts["shape"] for name, facts in case.facts["outputs"].items()}
    return {
        "pos_embed_interpolated": trace["positions"][..., : shapes["pos_embed_interpolated"][-1]],
        "tokens": trace["tokens"][:, : shapes["tokens"][1]],
        "block0": trace["block0"][:, : shapes["block0"][1]],
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


def _drawn(case: Case, key: str, over: str = "") -> Tensor:
    """An input "a*fill.values(...) + b" as its recipe in case.json states; "clip(round(...), low, high)" are integers.

    Args:
        over: the input that is added to it.
    """
    recipe = case.facts["inputs"][key]["recipe"]
    number = r"(\d+(?:\.\d+)?)"
    scale = re.search(number + r" ?\* ?fill", recipe)
    offset = re.search(r"fill\.values\([^()]*(?:\([^()]*\)[^()]*)*\) \+ " + number, recipe)
    bounds = re.search(r", " + number + ", " + number + r"\)", recipe.partition("clip")[2])
    found = case.input(key).cpu() * (float(scale[1]) if scale else 1) + (float(offset[1]) if offset else 0)
    if over:
        found = _drawn(case, over) + found
    return found.round().clamp(float(bounds[1]), float(bounds[2])).long() if bounds else found


def _losses(case: Case) -> dict[str, Tensor]:
    classes = case.facts["config"]["num_classes"]
    logits, ordinal = case.input("logits").cpu(), case.input("ordinal_logits").cpu()
    regression, grades = _drawn(case, "regression_logits"), _drawn(case, "label")
    heads = {
        "cross_entropy": ("classification", logits),
        "mse": ("regression", regression),
        "ordinal_bce": ("ordinal", ordinal),
        "coral": ("coral", ordinal),
        "corn": ("corn", ordinal),
    }
    found = {"labels": grades, "ordinal_labels": hvit.extended(grades, classes)}
    found |= {name: hvit.loss(head, out, grades, classes) for name, (head, out) in heads.items()}
    predicted = {
        "argmax": ("classification", logits),
        "ordinal": ("ordinal", ordinal),
        "corn": ("corn", ordinal),
        "regression": ("regression", regression),
    }
    return found | {f"pred_{name}": hvit.predict(head, out, classes) for name, (head, out) in predicted.items()}


def _metrics(case: Case) -> dict[str, Tensor]:
    grades, predicted = _drawn(case, "label"), _drawn(case, "noise", over="label")
    logits = case.input("logits").cpu().double() + 2 * F.one_hot(grades, case.facts["config"]["num_classes"])
    votes = _drawn(case, "votes")
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
    config = case.facts["config"]
    columns = case.facts["outputs"]["head"]["shape"][-1]
    found = {"head": dino.Head.from_official(case.state)(case.input("x"))[:, :columns]}
    temperatures = {"student": config["student_temp"], "teacher": config["teacher_temp"]}
    loss = dino.Loss(config["out_dim"], **temperatures, momentum=config["center_momentum"])
    for i in (0, 1):
        found[f"loss_epoch{i}"] = loss(case.input("student"), case.input("teacher"), config["ncrops"])
        found[f"center_after{i + 1}"] = loss.centre.clone()
    # "20 epochs of 5 steps: lr (0.0005 -> 1e-6, 4 warm-up epochs), weight decay (0.04 -> 0.4), teacher momentum (...)"
    lengths, _, ramps = config["schedules"].partition(":")
    epochs, steps = (int(n) for n in re.findall(r"\d+", lengths))
    for name, ramp in zip(("lr", "wd", "momentum"), re.findall(r"\(([^()]*)\)", ramps), strict=True):
        base, final, *warmup = (float(n) for n in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", ramp))
        found[f"{name}_schedule"] = torch.from_numpy(dino.cosine(base, final, epochs, steps, int(sum(warmup))))
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
    size, unit = tuple(config["level0"]), config["filter"]["ref_patch_size"] * ratio
    factors = slides.axis_factors(size, mask)
    coords, shares, contours = slides.find_tiles(mask, factors, size, int(config["tile"] * ratio), tiling, unit)
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
    width = len(state["slide"]["global_phi.0.weight"])
    last = {"classifier.weight": torch.zeros(6, width), "classifier.bias": torch.zeros(6)}
    top = HViT.from_official(state["slide"] | last, "classification").slide
    model = HViT(top, RegionEncoder.from_official(state["region"]), PatchEncoder.from_official(state["patch"]))
    inputs = case.facts["inputs"]
    places = [re.findall(r"saved as (\d+)_(\d+)", facts["recipe"])[0] for facts in inputs.values()]
    coords = np.array([[int(n) for n in place] for place in places])
    order = slides.file_order(coords)
    given = [case.input(list(inputs)[i]) for i in order]
    regions = np.stack([(48 * x + 128).round().clamp(0, 255).byte().cpu().numpy() for x in given])
    smooth, side = config["smoothing_region_and_patch"], config["region_size"] // config["downscale"]
    # pixels of a region
    step = int(config["smoothing_region_offset"] * config["region_size"] / 4096) if smooth else 0
    patch: list[list[_Bounds]] = []  # by shift: all regions' maps
    region: list[list[_Bounds]] = []
    for k in range(4 if smooth else 1):
        trace: dict[str, Tensor] = {}
        offset = k * step
        moved = np.pad(regions[:, offset:, offset:], ((0, 0), (0, offset), (0, offset), (0, 0)), constant_values=255)
        with torch.device("cpu"):
            pixels = slides.tensor(moved, "half")[None]
        model(pixels.to(torch.get_default_device()), trace=trace)
        seen = {key: value[0].cpu().numpy() for key, value in trace.items()}
        if k <= 1:  # the patch maps are shifted once, the region maps three times
            patch.append([tuple(map(heatmaps.lay_out, _ranks(a))) for a in seen["patch_attention"]])
        factor = side // seen["region_attention"].shape[-1]
        region.append([tuple(heatmaps.upsample(x, factor) for x in _ranks(a)) for a in seen["region_attention"]])
        if not k:
            first = seen
    share = heatmaps.ranks(first["pooling"], axes=1)
    found = {
        "patch_attention": first["patch_attention"][0],
        "region_attention": first["region_attention"][0],
        "slide_attention": share,
        "coords": coords[order],
        "region_score_head0": _nearest(
            case, "region_score_head0", [x[0] for x in _ranks(first["region_attention"][0])]
        ),
        "patch_score_head0": _nearest(case, "patch_score_head0", [x[0] for x in patch[0][0]]),
    }
    for variant, gamma in config["combos"]:
        name = f"blend_{variant}_gamma{gamma}"
        chosen = re.findall(
            r"region (\d+), region head (\d+), patch head (\d+)", case.facts["outputs"][name]["meaning"]
        )
        bounds = []
        for k in range(3):
            scores = [
                heatmaps.granular(
                    [p[i][k][low] for p in patch],
                    [r[i][k][high] for r in region],
                    share[i],
                    step // config["downscale"],
                    gamma,
                    variant,
                    official_quirks=smooth,
                )
                for i, high, low in (map(int, numbers) for numbers in chosen)
            ]
            bounds.append(np.stack(scores))
        found[name] = _nearest(case, name, bounds)
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found.items()}


_Bounds = tuple[np.ndarray, ...]


def _ranks(attention: np.ndarray) -> _Bounds:
    """Ranks of maps (..., s, s), the lowest and the highest that rounding allows.

    float32 attention has a relative error of 3e-6 (against float64). Two tokens whose attention is nearer than that may
    swap, and a score changes by a whole rank: at gamma 0.4 by 0.6 / 2 / 256 / 1.4 = 8e-4 in a smoothed local
    blend, 1.0e-3 of the largest.
    """
    flat = attention.reshape(*attention.shape[:-2], -1).astype(np.float64)
    ordered = np.sort(flat, axis=-1).reshape(-1, flat.shape[-1])
    rows = flat.reshape(ordered.shape)
    low, high = (
        np.stack([np.searchsorted(o, r * factor, "left") for o, r in zip(ordered, rows, strict=True)])
        for factor in (1 - ROUNDING, 1 + ROUNDING)
    )
    bounds = (x.reshape(attention.shape) / flat.shape[-1] for x in (low, high - 1))
    return heatmaps.ranks(attention), *bounds


def _nearest(case: Case, name: str, bounds: Sequence[np.ndarray]) -> np.ndarray:
    """Scores; of the scores that rounding allows those nearest to the recorded ones."""
    scores, low, high = bounds
    if name not in case.recorded:
        return scores
    recorded = case.recorded[name].cpu().numpy().reshape(scores.shape)
    return np.where(low < high, np.clip(recorded, low, high), scores)
