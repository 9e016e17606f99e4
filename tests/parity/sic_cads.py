"""SIC-CADS: a whole recogniser, the authors' two detectors, and evaluations of files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import clip_boxes_to_image

from companion.data.detection import OV_COCO_BASE, OV_COCO_NOVEL
from companion.evaluation.metrics.detection import evaluate
from companion.models.sic_cads.model import IMAGENET, MLR, Settings, detect, pool, refine

from .runner import Case

# --- the recogniser ---------------------------------------------------------------------------------------------------


def _statistics(maps: Sequence[Tensor]) -> Tensor:
    """Mean, unbiased std, largest magnitude, first and last value of each map."""
    return torch.stack([torch.stack([m.mean(), m.std(), m.abs().max(), m.flatten()[0], m.flatten()[-1]]) for m in maps])


@torch.no_grad()
def recogniser(case: Case) -> dict[str, Tensor]:
    """Every stage from an image to scores, and the losses of a training image."""
    s = case.facts["settings"]
    sizes = {name: s[name] for name in ("lambda_base", "lambda_novel", "levels", "tau")}
    settings = Settings(**sizes, image_input=replace(IMAGENET, size=s["size"]))
    model = MLR.from_official(case.state, case.input("novel"), settings)
    image = case.input("image").to(torch.uint8)
    x, crops = model.prepared(image), model.crops(image)
    maps = model.forward_features(x)
    pooled = model.heads.pooled(maps)
    e_text, e_image = model.heads(maps)
    plus, student = model.recognise(image), model.recognised(e_text, e_image)
    found = {
        "backbone_input_corner": x[0, :, :8, :8],
        "clip_input_corner": crops[0, :, :, :8, :8],
        "c_stats": _statistics(model.body.forward_intermediates(x, indices=[2, 3, 4], intermediates_only=True)),
        "fpn_stats": _statistics(maps),
        "gmp": pooled,
        "global_lin": model.heads.shared(pooled),
        "e_text": e_text,
        "e_image": e_image,
        "clip_embed": model.teacher(crops[0]),
        "s_text": pool(plus.text, s["levels"]),
        "s_image_clip": pool(plus.image, s["levels"]),
        "s_image_student": pool(student.image, s["levels"]),
        "p_mmlr": plus.p,
        "p_mmlr_student": student.p,
        "p_cross": model.recognise(image, share=s["share"]).p,
        "top20_student": student.p.topk(s["best"]).indices,
    }
    if "train" in case.facts["inputs"]:
        training = case.input("train").to(torch.uint8), case.input("positives")
        found |= dict(zip(("mlr_loss", "img_kd_loss"), model.loss(*training, boxes=s["boxes"]), strict=True))
    return found


# --- the detectors that the authors refine ----------------------------------------------------------------------------


def detector_scores(stages: Sequence[Tensor], objectness: Tensor | None = None) -> Tensor:
    """Probabilities (R, C + 1) of a detector with one or more stages of logits (R, C + 1): the mean over the stages.

    With `objectness` (R,), the proposals' scores, the root of the product (CenterNet2 on OV-LVIS); without, as Faster
    R-CNN on OV-COCO.
    """
    mean = sum(logits.sigmoid() for logits in stages) / len(stages)
    return mean if objectness is None else (mean * objectness[:, None]).sqrt()


def cascade_boxes(
    proposals: Tensor, deltas: Sequence[Tensor], weights: Sequence[Sequence[float]], image_size: Sequence[int]
) -> Tensor:
    """Boxes (R, 4), xyxy in pixels, after one or more stages of offsets (R, 4), each on the clipped boxes before it.

    `weights`: what each stage divides its offsets by, ((10, 10, 5, 5),) in Faster R-CNN. `image_size`: height, width.
    """
    boxes = proposals
    for offsets, stage in zip(deltas, weights, strict=True):
        boxes = clip_boxes_to_image(BoxCoder(tuple(stage)).decode(offsets, [boxes])[:, 0], tuple(image_size))
    return boxes


def refinement(case: Case) -> dict[str, Tensor]:
    """A detector's probabilities and detections, refined and, of a cascade, plain; the background column is last."""
    s, inputs = case.facts["settings"], case.facts["inputs"]
    logits, deltas = ([case.input(n) for n in inputs if n.startswith(start)] for start in ("logits", "deltas"))
    height, width = s["image_size"]
    x, y, w, h = case.input("boxes").unbind(-1)
    x, y, w, h = x * width, y * height, (0.1 + 0.5 * w) * width, (0.1 + 0.5 * h) * height
    limits = torch.tensor([width, height, width, height])
    proposals = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1).clamp_min(0).minimum(limits)
    plain = detector_scores(logits, case.input("objectness") if s["stages"] else None)
    refined = F.pad(refine(plain[:, :-1], case.input("mlr")[0], s["gamma"]), (0, 1))
    boxes = cascade_boxes(proposals, deltas, s["box_weights"], s["image_size"])
    found = {"base_scores" if s["stages"] else "probs": plain, "refined": refined}
    for name, scores in (("det", refined), ("plain", plain)):
        best = detect(boxes, scores[:, :-1], s["score_thresh"], s["nms_thresh"], s["topk"])
        found |= {f"{name}_boxes": best.boxes, f"{name}_scores": best.scores, f"{name}_classes": best.classes}
        found[f"{name}_proposal"] = best.rows
    return found


# --- evaluations ------------------------------------------------------------------------------------------------------


def coco(case: Case) -> dict[str, Tensor]:
    """Box AP of OV-COCO, in percent; of a class without ground truth the toolkit's -1."""
    groups = {"AP50-seen": OV_COCO_BASE, "AP50-unseen": OV_COCO_NOVEL}
    scores = evaluate(case.folder / "gt.json", case.folder / "dets.json")
    totals = scores.totals | {name: scores.mean(group) for name, group in groups.items()}
    stats = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR@1", "AR@10", "AR@100", "ARs", "ARm", "ARl")
    found = {name: torch.tensor(value) for name, value in totals.items()}
    each = torch.from_numpy(np.where(np.isfinite(scores.ap50), scores.ap50, -1))
    return found | {"ap50_per_class": each, "stats": torch.tensor([totals[name] / 100 for name in stats])}


def lvis(case: Case) -> dict[str, Tensor]:
    """Federated box AP of OV-LVIS, as a share."""
    totals = evaluate(case.folder / "gt.json", case.folder / "dets.json", style="lvis").totals
    found = {name: torch.tensor(value / 100) for name, value in totals.items()}
    return found | {"ap": torch.stack([found[name] for name in ("AP", "AP50", "AP75", "APr", "APc", "APf")])}
