"""The dry run of every paper's recipe in float32 and under bfloat16 autocast: two steps, and outputs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from companion.models.dplq import domain_model
from companion.models.layers.clip_prompting import similarity
from companion.models.sic_cads.model import Heads
from companion.toy import encoders
from tests.conftest import parameters
from tests.models.common import draw
from tests.papers.common import shrink, trainings

CASES = trainings()
ROUNDING = 2.0**-8  # of one number in bfloat16, whose significand has 8 bits


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "dmt, detect")) for n in CASES])
def test_a_paper_trains_and_predicts_in_float32_and_bfloat16(name, monkeypatch, tmp_path):
    """Losses and outputs differ by a few roundings of bfloat16; outputs are in float32."""

    def found(precision: str) -> tuple[Tensor, Tensor | None, bool]:
        p, kinds = parameters(slug, **usual | training.changes, precision=precision), set()
        with register_module_forward_hook(lambda module, given, output: kinds.add(getattr(output, "dtype", None))):
            history, outputs = training.train(recipe, p, tmp_path / precision)
        return torch.tensor([row["loss"] for row in history]), outputs, torch.bfloat16 in kinds

    training, slug = CASES[name], name.partition(",")[0]
    recipe = shrink(slug, monkeypatch)
    usual = {"profile": "paper", "dry_run": True, "accelerator": "cpu", "data_root": "nowhere"}
    (full, expected, no), (half, outputs, yes) = found("32-true"), found("bf16-mixed")
    assert yes and not no and len(full) == 2 and full.isfinite().all()
    torch.testing.assert_close(half, full, rtol=training.rounding * ROUNDING, atol=0)
    if expected is not None:
        assert outputs.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(outputs, expected, rtol=0, atol=8 * ROUNDING * float(expected.abs().max()))


SHIELDED: dict[str, Callable[[], tuple[Tensor, ...]]] = {
    "similarity of CLIP": lambda: (similarity(encoders.build("pocket_clip"), draw(4, 64), draw(5, 64, seed=2)),),
    "domain model of DPLQ": lambda: (
        domain_model("vit_tiny_patch16_224", "random", clip=encoders.build("pocket_clip"))(draw(2, 3, 32, 32)),
    ),
    "heads of SIC-CADS": lambda: Heads(24, 16)([draw(2, 24, 8, 8)]),
}


@torch.no_grad()
@pytest.mark.parametrize("name", SHIELDED)
def test_what_half_precision_would_spoil_is_computed_in_float32_under_autocast(name):
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(SHIELDED[name]())
    assert all(x.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(*found, strict=True))
