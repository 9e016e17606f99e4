"""SIC-CADS: the cases recorded from mala-lab/SIC-CADS at c9f28e1."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from companion.data.detection import OV_COCO_BASE, OV_COCO_NOVEL
from companion.evaluation.metrics.detection import evaluate, recognition_ap
from .legacy import Case, run
from companion.models.layers.state_dicts import load_official
from companion.models.sic_cads.model import (
    CROSS_DATASET,
    IMAGENET,
    MLR,
    Heads,
    ZeroShotClassifier,
    cascade_boxes,
    detect,
    detector_scores,
    distillation_loss,
    fuse,
    normalise,
    pool,
    rank_loss,
    refine,
    text_share,
)

TAU = {"lvis": 50.0, "coco": 20.0}  # logit scale by the configuration


def outputs(case: Case) -> dict[str, Tensor]:
    """The recorded quantities of any SIC-CADS case, by our code, in the order of the forward pass."""
    kinds = {
        "mlr_heads": _heads,
        "mlr_losses": _losses,
        "mlr_metrics": _recognition,
        "mlr": _model,  # a whole recogniser, of any vocabulary and images
        "refine_cascade": _cascade,
        "refine_res5": _res5,
        "zero_shot_classifier": _classifier,
        "eval_ov_coco": _coco,
        "eval_ov_lvis": _lvis,
    }
    return run(kinds, case, case.facts["case"])


def _pixels(case: Case, name: str, shape: Sequence[int]) -> Tensor:
    return (127.5 + 50 * case.values(f"input:{name}", *shape)).round().clamp(0, 255).to(torch.uint8)[None]


def _training(case: Case) -> tuple[list[int], list[int], bool]:
    """Shape and labels of the training image, and whether these are of boxes: of the sentence that names it."""
    text = case.facts["train_losses_input"]
    shape, labels = ([int(n) for n in found.split(",")] for found in re.findall(r"\[([\d, ]+)\]", text)[:2])
    return shape, labels, "boxes" in text


def _novel(case: Case) -> Tensor:
    novel = torch.zeros(case.facts["config"]["num_classes"], dtype=torch.bool)
    novel[case.facts["novel_class_indices"]] = True
    return novel


def _statistics(maps: list[Tensor]) -> Tensor:
    """Mean, unbiased std, largest magnitude, first and last value of each map."""
    return torch.stack([torch.stack([m.mean(), m.std(), m.abs().max(), m.flatten()[0], m.flatten()[-1]]) for m in maps])


def _model(case: Case) -> dict[str, Tensor]:
    config = case.facts["config"]
    model = MLR.from_official(
        case.state,
        _novel(case),
        lambda_base=config["lambda_base"],
        lambda_novel=config["lambda_novel"],
        levels=config["levels"] if config["multi_scale"] else 1,
        tau=TAU["coco" if "coco" in config["file"] else "lvis"],
        image_input=replace(IMAGENET, size=config["inference_resolution"]),
    )
    image = _pixels(case, "image", case.facts["inputs"]["image"]["shape"])
    with torch.no_grad():
        x, crops = model.prepared(image), model.crops(image)
        found: dict[str, Tensor] = {
            "backbone_input_corner": x[0, :, :8, :8],
            "clip_input_corner": crops[0, :, :, :8, :8],
        }
        bottom_up = model.body.forward_intermediates(x, indices=[2, 3, 4], intermediates_only=True)
        maps = model.forward_features(x)
        pooled = model.heads.pooled(maps)
        e_text, e_image = model.heads(maps)
        embedded = model.teacher(crops[0])
        plus = model.recognise(image)
        student = model.recognised(e_text, e_image)
        cross = model.recognise(image, share=CROSS_DATASET)
        if "train_losses" in case.facts:
            shape, labels, boxes = _training(case)
            positives = torch.zeros(1, config["num_classes"], dtype=torch.bool)
            positives[0, labels] = True
            ranked, distilled = model.loss(_pixels(case, "train", shape), positives, boxes=boxes)
            found |= {"mlr_loss": ranked, "img_kd_loss": distilled}
        best = min(case.facts["outputs"].get("top20_student", {"shape": [20]})["shape"][-1], len(model.text))
    return found | {
        "c_stats": _statistics(bottom_up),
        "fpn_stats": _statistics(maps),
        "gmp": pooled,
        "global_lin": model.heads.shared(pooled),
        "e_text": e_text,
        "e_image": e_image,
        "clip_embed": embedded,
        "s_text": pool(plus.text, model.levels),
        "s_image_clip": pool(plus.image, model.levels),
        "s_image_student": pool(student.image, model.levels),
        "p_mmlr": plus.p,
        "p_mmlr_student": student.p,
        "p_cross": cross.p,
        "top20_student": student.p.topk(best).indices,
    }


def recorded(case: Case) -> dict[str, Tensor]:
    """What the case recorded: the outputs, and from case.json the losses and the results of an evaluation."""
    losses = case.facts.get("train_losses", {})
    found = case.recorded | {name: torch.tensor(value) for name, value in losses.items()}
    results = case.facts.get("results", {})
    return found | {name: torch.tensor(value, dtype=torch.float64) for name, value in results.items()}


@torch.no_grad()
def _heads(case: Case) -> dict[str, Tensor]:
    config, novel = case.facts["config"], _novel(case)
    text = case.state["text_embedding.weight"]
    maps = [case.input(f"p{i}") for i in range(3, 8)]
    heads = Heads(sum(m.shape[1] for m in maps), text.shape[1], config["levels"])
    layers = {"shared": "mlr_lin", "to_text": "mlr_lin2", "to_image": "image_embedding"}
    names = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in layers.items() for kind in ("weight", "bias")}
    # of a whole checkpoint only these are read
    load_official(heads, {name: case.state[name] for name in names.values()}, names, "the heads")
    e_text, e_image = heads(maps)
    s_text, s_image = (pool(e @ text.mT, config["levels"]) for e in (e_text, e_image))
    share = text_share(novel, config["lambda_base"], config["lambda_novel"])
    batch, image = ((normalise(s_text, over), normalise(s_image, over)) for over in ("batch", "image"))
    return {
        "e_text": e_text,
        "e_image": e_image,
        "s_text": s_text,
        "s_image": s_image,
        "p_mmlr_batch": fuse(*batch, share),
        "p_mmlr_per_image": fuse(*image, share),
        "p_cross_batch": fuse(*batch, CROSS_DATASET),
    }


def _losses(case: Case) -> dict[str, Tensor]:
    inputs, config = case.facts["inputs"], case.facts["config"]

    def many_hot(labels: list[list[int]]) -> Tensor:
        found = torch.zeros(len(labels), config["num_classes"], dtype=torch.bool)
        for row, positives in zip(found, labels, strict=True):
            row[positives] = True
        return found

    base = torch.zeros(config["num_classes"], dtype=torch.bool)
    base[config["base_class_indices"]] = True
    boxes, found = many_hot(inputs["box_labels"]), {}
    for name, positives, columns in (
        ("rank_box", boxes, base),
        ("rank_image", many_hot(inputs["image_labels"]), None),
        ("rank_box_all_classes", boxes, None),
    ):
        scores = (2 * case.input("scores")).requires_grad_()
        found[name] = rank_loss(scores, positives, columns)
        found[f"{name}_grad"] = torch.autograd.grad(found[name], scores)[0]
    student, teacher = (F.normalize(case.input(name), dim=-1) for name in ("student", "teacher"))
    return found | {"kd": distillation_loss(student, teacher)}


def _proposals(case: Case) -> Tensor:
    height, width = case.facts["config"]["image_size"]
    x, y, w, h = case.input("boxes").sigmoid().unbind(-1)
    x, y, w, h = x * width, y * height, (0.1 + 0.5 * w) * width, (0.1 + 0.5 * h) * height
    limits = torch.tensor([width, height, width, height])
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1).clamp_min(0).minimum(limits)


def _refined(case: Case, scores: Tensor) -> Tensor:
    """The refined matrix with the background column, which is 0."""
    p = case.input("mlr").sigmoid()[0]
    return F.pad(refine(scores[:, :-1], p, case.facts["config"]["gamma"]), (0, 1))


def _cascade(case: Case) -> dict[str, Tensor]:
    config, inputs = case.facts["config"], case.facts["inputs"]
    stages = range(config["stages"])
    logits = [2 * case.values(f"input:logits{k}", *inputs["logits"]["shape"]) - 2 for k in stages]
    deltas = [0.2 * case.values(f"input:deltas{k}", *inputs["deltas"]["shape"]) for k in stages]
    base = detector_scores(logits, case.input("objectness").sigmoid())
    refined = _refined(case, base)
    boxes = cascade_boxes(_proposals(case), deltas, config["box_weights"], config["image_size"])
    found = {"base_scores": base, "refined": refined}
    for name, scores in (("det", refined), ("plain", base)):
        result = detect(boxes, scores[:, :-1], config["score_thresh"], config["nms_thresh"], config["topk"])
        found |= {f"{name}_boxes": result.boxes, f"{name}_scores": result.scores, f"{name}_classes": result.classes}
    return found


def _res5(case: Case) -> dict[str, Tensor]:
    config = case.facts["config"]
    probs = detector_scores([2 * case.input("logits") - 2])
    refined = _refined(case, probs)
    deltas = [0.2 * case.input("deltas")]
    boxes = cascade_boxes(_proposals(case), deltas, [config["box_weights"]], config["image_size"])
    result = detect(boxes, refined[:, :-1], config["score_thresh"], config["nms_thresh"], config["topk"])
    return {
        "probs": probs,
        "refined": refined,
        "det_boxes": result.boxes,
        "det_scores": result.scores,
        "det_classes": result.classes,
        "det_proposal": result.rows,
    }


@torch.no_grad()
def _classifier(case: Case) -> dict[str, Tensor]:
    config = case.facts["config"]
    layer = ZeroShotClassifier(config["input"], case.input("zs_weight"), config["temperature"])
    load_official(layer, case.state, {name: name for name in case.names}, "the classifier")
    x = case.input("x")
    return {"logits": layer(x), "logits_custom": layer(x, case.input("classifier"))}


def _recognition(case: Case) -> dict[str, Tensor]:
    raw = case.input("scores")
    labels = case.input("labels") + 0.6 * raw > 1.2
    without = re.search(r"column (\d+) set to 0", case.facts["inputs"]["labels"]["how"])
    if without:
        labels[:, int(without[1])] = False
    ap = recognition_ap(labels.cpu().numpy(), raw.sigmoid().cpu().numpy())
    return {"ap": _marked(ap, -100), "mean": torch.tensor(np.nanmean(ap))}


def _marked(values: np.ndarray, mark: float = -1) -> Tensor:
    """Percentages with the toolkits' mark for a class without positives: -1, in the authors' own score times 100."""
    return torch.from_numpy(np.where(np.isfinite(values), values, mark))


def _coco(case: Case) -> dict[str, Tensor]:
    groups = {"AP50-seen": OV_COCO_BASE, "AP50-unseen": OV_COCO_NOVEL}
    scores = evaluate(case.folder / "gt.json", case.folder / "dets.json", groups=groups)
    totals = scores.totals | {name: scores.mean(group) for name, group in groups.items()}
    stats = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR@1", "AR@10", "AR@100", "ARs", "ARm", "ARl")
    found = {name: torch.tensor(value) for name, value in totals.items()}
    return found | {"ap50_per_class": _marked(scores.ap50), "stats": torch.tensor([totals[s] / 100 for s in stats])}


def _lvis(case: Case) -> dict[str, Tensor]:
    totals = evaluate(case.folder / "gt.json", case.folder / "dets.json", style="lvis").totals
    found = {name: torch.tensor(value / 100) for name, value in totals.items()}
    return found | {"ap": torch.stack([found[name] for name in ("AP", "AP50", "AP75", "APr", "APc", "APf")])}
