"""The runner of recorded cases takes its sizes and settings from the case."""

import json
import shutil

import pytest
import torch
from torch.nn import functional as F

from companion.evaluation.parity import Case, folder
from companion.models.metasegnet import parity


def test_losses_of_other_sizes_and_another_seed(tmp_path):
    shutil.copytree(folder() / "metasegnet" / "losses", tmp_path / "losses")
    path = tmp_path / "losses" / "case.json"
    facts = json.loads(path.read_text())
    facts["config"] |= {"num_classes": 5, "ignore_index": 5, "smooth_factor": 0.1}
    facts |= {
        "seed": 3,
        "inputs": {k: v.replace("[2, 8, 24, 20]", "[3, 5, 16, 12]") for k, v in facts["inputs"].items()},
    }
    path.write_text(json.dumps(facts))
    case = Case(path.parent)
    found = parity.outputs(case)
    labels, logits = found["labels"], 2 * case.values("input:logits", 3, 5, 16, 12)
    assert labels.shape == (3, 16, 12) and set(labels.unique().tolist()) == {0, 1, 2, 3, 5}
    theirs = F.cross_entropy(logits, labels, ignore_index=5, label_smoothing=0.1)
    assert found["torch_cross_entropy_label_smoothing_0.1"].item() == pytest.approx(float(theirs), rel=1e-5)
    assert found["grad_joint"].shape == (5, 16, 12) and torch.isfinite(found["dice"])
