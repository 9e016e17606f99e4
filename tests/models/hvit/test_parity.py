"""The parity runner builds models and inputs of any size from case.json."""

import json
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F

from companion.evaluation.parity import Case, folder
from companion.models.hvit import parity


def variant(tmp_path, name: str, sizes: dict[str, list[int]], **config) -> Case:
    """A recorded case with inputs of other sizes and another configuration."""
    facts = json.loads((folder() / "hvit" / name / "case.json").read_text())
    for key, shape in sizes.items():
        facts["inputs"][key]["shape"] = shape
    facts["config"] |= config
    (tmp_path / name).mkdir()
    (tmp_path / name / "case.json").write_text(json.dumps(facts))
    names = folder() / "hvit" / name / "names.json"
    if names.exists():
        (tmp_path / name / "names.json").write_text(names.read_text())
    return Case(tmp_path / name)


def test_other_sizes(tmp_path):
    sizes = {"logits": [13, 6], "ordinal_logits": [13, 5], "regression_logits": [13, 1], "label": [13]}
    losses = variant(tmp_path, "losses", sizes)
    found = parity.outputs(losses)
    grades = (1.5 * losses.values("input:label", 13) + 2.5).round().clamp(0, 5).long()
    assert torch.equal(found["labels"], grades) and found["ordinal_labels"].shape == (13, 5)
    torch.testing.assert_close(found["cross_entropy"], F.cross_entropy(losses.input("logits"), grades))
    regression = 2 * losses.input("regression_logits")[:, 0] + 2.5
    torch.testing.assert_close(found["mse"], F.mse_loss(regression, grades.float()))

    metrics = variant(tmp_path, "metrics", {"label": [333], "noise": [333], "logits": [333, 6], "votes": [40, 5]})
    found = parity.outputs(metrics)
    noisy = (found["labels"] + 0.9 * metrics.values("input:noise", 333)).round().clamp(0, 5).long()
    assert torch.equal(found["preds"], noisy) and int(found["confusion"].sum()) == 333
    assert found["votes"].shape == (40, 5) and found["vote_result"].shape == (40, 2)

    schedules = (
        "30 epochs of 4 steps: lr (0.001 -> 1e-5, 2 warm-up epochs), weight decay (0.1 -> 0.2), momentum (0.9 -> 1)"
    )
    dino = variant(tmp_path, "dino", {"student": [18, 384], "teacher": [6, 384]}, out_dim=384, ncrops=6)
    dino.facts["config"]["schedules"] = schedules
    dino.names.update({"last_layer.weight_g": [384, 1], "last_layer.weight_v": [384, 256]})
    found = parity.outputs(dino)
    assert found["center_after1"].shape == (1, 384) and len(found["lr_schedule"]) == 120
    teacher = (dino.input("teacher") / 0.04).softmax(-1).chunk(2)
    student = (dino.input("student") / 0.1).log_softmax(-1).chunk(6)
    pairs = [-(t * s).sum(-1).mean() for i, t in enumerate(teacher) for j, s in enumerate(student) if i != j]
    torch.testing.assert_close(found["loss_epoch0"], torch.stack(pairs).mean())
    assert found["lr_schedule"][8] == 1e-3 and found["wd_schedule"][0] == 0.1


def test_ranks_that_rounding_may_change():
    attention = np.array([[[0.1, 0.2], [0.2 * (1 + 1e-6), 0.3]]], np.float32)
    scores, low, high = parity._ranks(attention)
    assert scores.tolist() == [[[0, 0.25], [0.5, 0.75]]]
    assert low.tolist() == [[[0, 0.25], [0.25, 0.75]]] and high.tolist() == [[[0, 0.5], [0.5, 0.75]]]
    swapped = torch.tensor([[[0, 0.5], [0.25, 0.5]]])  # the last one is wrong
    case = SimpleNamespace(recorded={"scores": swapped})
    assert parity._nearest(case, "scores", (scores, low, high)).tolist() == [[[0, 0.5], [0.25, 0.75]]]
