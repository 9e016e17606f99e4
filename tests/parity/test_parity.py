"""Every paper's model against outputs recorded from its authors' code; `PARITY_EXTRA=<folder>` adds cases."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from companion.errors import CorruptFile
from tests.papers.common import of_all

from . import fill, runner
from .record import record


def _cases():
    full_size = of_all("FULL_SIZE")
    for paper in runner.papers():
        for case in runner.cases(paper):
            full = case.name in full_size.get(paper, ())
            marks = [pytest.mark.slow, pytest.mark.large] if full else []
            yield pytest.param(case, id=f"{paper}-{case.name}", marks=marks)


@pytest.mark.parametrize("case", list(_cases()))
def test_same_outputs_as_the_authors_code(case):
    differences = runner.compare(case)
    assert differences and [d for d in differences if not d.agrees] == []


def test_extra_cases_are_compared_and_a_broken_one_is_refused(tmp_path, monkeypatch):
    copy = tmp_path / "sa2vp" / "extra"
    shutil.copytree(runner.ROOT / "sa2vp" / "tiny_cross_attention", copy)
    monkeypatch.setenv("PARITY_EXTRA", str(tmp_path))
    (case,) = [case for case in runner.cases("sa2vp") if case.name == "extra"]
    state = {name: 1.1 * value for name, value in case.state.items()}
    assert not all(d.agrees for d in runner.compare(runner.Case(copy, state)))
    (copy / "outputs.safetensors").write_bytes(b"no")
    with pytest.raises(CorruptFile, match="extra"):
        runner.compare(case)


def test_a_recorded_case_agrees_with_the_code_that_it_was_recorded_from(tmp_path):
    """Outputs, a stored input and the norms of gradients; not with other code."""
    steps = [
        {"name": "model", "call": "torch:nn.Linear", "args": [3, 4]},
        {"name": "_", "call": "$model.load_state_dict", "args": ["$state"]},
        {"name": "y", "call": "$model", "args": ["$x"]},
        {"name": "loss", "call": "torch:nn.functional.cross_entropy", "args": ["$y", "$labels"]},
        {"name": "grad", "backward": "$loss", "of": "$model"},
    ]
    taps = {"y": "$y", "loss": "$loss", "grad:*": {"each": "$grad", "apply": ["norm"]}}

    def forward(model, given):
        y = model(given["x"])
        return {"y": y, "loss": nn.functional.cross_entropy(y, given["labels"])}

    inputs, about = {"x": (5, 3), "labels": torch.arange(5) % 4}, {"official_commit": "owner/name@0"}
    for case, label_smoothing in {"same": 0.0, "other": 0.1}.items():
        steps[3]["kwargs"] = {"label_smoothing": label_smoothing}
        folder = record("paper", case, nn.Linear(3, 4), forward, inputs, steps, taps, about=about, root=tmp_path)
        wrong = {d.output for d in runner.compare(runner.Case(folder)) if not d.agrees}
        assert wrong == (set() if case == "same" else {"loss", "grad:weight", "grad:bias"})
    assert len(runner.compare(runner.Case(folder))) == 4


def test_fill_is_fixed_for_ever():
    """Values recorded once: another NumPy or machine must give the same weights."""
    np.testing.assert_allclose(fill.values("a", (3,)), [3.0030537, 1.4173826, 1.7369606], rtol=1e-6)
    assert fill.parameter("x.weight", (4, 8)).std() < 0.6
    assert abs(fill.parameter("norm.weight", (512,)).mean() - 1) < 0.02
    assert (fill.parameter("bn.running_var", (64,)) >= 1).all()
