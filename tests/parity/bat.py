"""BAT: the recorded cases that are no list of calls."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from companion.data import tracking as data
from companion.evaluation.metrics import tracking as metrics
from companion.models.bat import BAT
from companion.models.bat.tracking import Frames, follow
from companion.training.hardware import CPU

from .runner import Case


def track_loop(case: Case) -> dict[str, Tensor]:
    """Boxes and scores of a video. Its weights are those of model_256, next to it, unless it has its own."""
    own = (case.folder / "names.json").exists()
    model = BAT.from_official(case.state if own else Case(case.folder.parent / "model_256", case.given).state)
    video = Frames([np.asarray(case.input(name)) for name in case.facts["inputs"]])
    track = follow(model, [video], [case.facts["settings"]["init_box_xywh"]], hardware=CPU)[0]
    return {"boxes": torch.from_numpy(track.boxes), "best_score": torch.from_numpy(track.scores[1:])}


def raw_results(case: Case) -> dict[str, Tensor]:
    """The scores of the authors' own boxes, stored for all sequences one after the other."""
    settings = case.facts["settings"]
    boxes = torch.cat([case.input(name) for name in sorted(case.facts["inputs"])]).double().cpu().numpy()
    results = {name: boxes[first : first + rows] for name, (first, rows) in settings["rows"].items()}
    dataset = settings["dataset"]
    scores = metrics.evaluate(results, data.ground_truth(dataset), dataset.removeprefix("rgbt/"))
    table = scores.per_sequence.loc[settings["names"], settings["metrics"]]
    totals = {name: torch.tensor(value) for name, value in scores.totals.items()}
    return totals | {"per_sequence": torch.tensor(table.to_numpy(np.float64))}
