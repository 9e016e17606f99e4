"""State dicts under the authors' names: loaded, given back, and refused with a list of what does not fit."""

import pytest
import torch

from tests.models.common import misfits
from tests.papers.common import of_all
from tests.parity import runner

CASES = [f"{slug}/{name}" for slug, names in of_all("OFFICIAL").items() for name in names]
UNUSED = "visual_net."  # of DPLQ, in no forward pass
TIED = {"bert_encoder.model.cls.predictions.decoder.bias": "bert_encoder.model.cls.predictions.bias"}


@pytest.mark.parametrize("name", CASES)
def test_names_there_and_back_and_what_does_not_fit(name):
    case = runner.Case(runner.ROOT / name)
    state = {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(case.names.items())}
    state |= {name: state[same] for name, same in TIED.items() if name in state}
    (step,) = (step for step in case.facts["steps"] if step.get("call", "").endswith(".from_official"))

    def read(state):
        return runner._called(step["call"], None)(state, *step["args"][1:], **step["kwargs"])

    again = {n: t for n, t in read(state).to_official().items() if not n.endswith("num_batches_tracked")}
    assert again.keys() == {n for n in state if not n.startswith(UNUSED) and not n.endswith("num_batches_tracked")}
    assert all(torch.equal(t, state[n]) for n, t in again.items())
    *_, other, missing = (n for n in again if n.endswith("bias") and n not in {*TIED, *TIED.values()})
    state[f"{missing}_typo"], state[other] = state.pop(missing), torch.zeros(3, 7)
    found = misfits(read, state)
    assert found[:2] == ([missing], [f"{missing}_typo"]) and found[2][0].startswith(f"{other} (3, 7)")
