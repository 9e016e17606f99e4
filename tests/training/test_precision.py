"""The dry run of every paper's recipe in float32 and under bfloat16 autocast: two steps, and outputs."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from companion.models.dplq import domain_model
from companion.models.layers.clip_prompting import similarity
from companion.models.sic_cads import predictions
from companion.models.sic_cads.model import Heads
from companion.toy import encoders
from companion.training.fit import outputs_of
from companion.training.hardware import Hardware
from companion.training.recipe import run
from tests.conftest import parameters
from tests.models.common import draw
from tests.small import shrink

Found = tuple[list[dict], Tensor | None]
"""The history of a training, and outputs of the untrained model: None where rounding may change which is selected."""


def sa2vp(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    found = recipe.run(p, out)
    untrained = recipe.training(p, found.data).build()
    return found.history, outputs_of(untrained, found.data.splits["test"], hardware=recipe.hardware(p))


def bat(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    _, history = run(recipe.training(p, Hardware.of(p, "bat")))
    for boxes in recipe.run(p, out).boxes.values():  # in images of 240 x 180
        assert np.isfinite(boxes).all() and (boxes[:, :2] + boxes[:, 2:] <= [240, 180]).all()
    return history, None


def dplq(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    found, clip = recipe.run(p, out), recipe._clip("random")
    test = found.tests["source"]
    untrained = recipe.build(p, p.method, test.class_names, clip, recipe._domain(p, clip))
    torch.manual_seed(0)  # the noise of the prompts
    return found.history, outputs_of(untrained, test, hardware=recipe.hardware(p))


def promptpar(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    found = recipe.run(p, out)
    torch.manual_seed(p.seed)
    untrained = recipe.build(p, found.names, *recipe._backbones(p))
    return found.history, recipe.probabilities(p, untrained, found.test)


def hvit(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    found = recipe.run(p, out)
    return found.history, recipe.outputs(recipe.build(p), found.test, Hardware.of(p, "hvit"))


def ecamp(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    if p.task == "pre-train":
        return run(recipe.pretraining(p, out, real=False))[1], None
    training, data = recipe.downstream(p, real=False)
    torch.manual_seed(0)
    history = run(training)[1]
    torch.manual_seed(0)
    ((outputs, _),) = recipe.outputs(p, training.build(), data["test"])
    return history, torch.cat([x.flatten() for x in (outputs if isinstance(outputs, list) else [outputs])])


def sic_cads(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    title, images = recipe.data(p)
    test = images["test"]
    detector, *parts = recipe.frozen(p, test)
    torch.manual_seed(0)
    history = run(recipe.training(p, *recipe.recogniser(p, *parts, test.unseen, images)))[1]
    torch.manual_seed(0)
    model = recipe.build(p, *parts, test.unseen, "random")
    outputs = predictions.collect(model, detector, test, hardware=Hardware.of(p, "sic_cads"), title=title)
    assert outputs.boxes[0].dtype == outputs.probabilities[0].dtype == torch.float32
    return history, outputs.scores[p.branch]


def metasegnet(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    _, training, tests = recipe.setting(p)
    history = recipe.train(training)[1]
    test = tests["test"]
    hardware = training.fit["hardware"]
    counts = recipe.confusion(training.build(), test, recipe.texts_of(p, test), hardware=hardware).float()
    return history, counts / counts.sum()


def dmt(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    if p.task == "distil":
        return run(recipe.distillation(p, out, real=False)[1])[1], None
    _, training, score = recipe.downstream(p, out, real=False)
    model, history = run(training)
    assert np.isfinite([*score(model).values()]).all()
    return history, None


def tip(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    pipe, p.dry_run = recipe.build(), False
    data = recipe.samples(recipe.Generated(4, p.size, 0), p.size, p.method, 0)
    with mock.patch.multiple(recipe, EPOCHS=1, BATCH=2):
        history = recipe.train(p, pipe, data)
    restored = recipe.restore(pipe, [data[i] for i in range(2)], steps=2, hardware=Hardware.of(p, "tip"))
    assert restored.dtype == torch.float32 and 0 <= restored.min() < restored.max() <= 1
    return history, None


CASES: dict[str, tuple[Callable, dict]] = {
    "sa2vp": (sa2vp, {}),
    "bat": (bat, {}),
    "dplq": (dplq, {"protocol": "cross-dataset"}),
    "promptpar": (promptpar, {}),
    "hvit": (hvit, {"region": 1024, "folds": 1}),
    "ecamp, pre-train": (ecamp, {}),
    "ecamp, fine-tune": (ecamp, {"task": "fine-tune", "dataset": "xrays/covidx"}),
    "ecamp, segment": (ecamp, {"task": "segment", "dataset": "xrays/siim"}),
    "ecamp, detect": (ecamp, {"task": "detect", "dataset": "xrays/rsna"}),
    "sic_cads": (sic_cads, {}),
    "metasegnet": (metasegnet, {}),
    "dmt, distil": (dmt, {}),
    "dmt, fine-tune": (dmt, {"task": "fine-tune"}),
    "dmt, linear probe": (dmt, {"task": "linear probe"}),
    "dmt, detect": (dmt, {"task": "detect"}),
    "dmt, segment": (dmt, {"task": "segment"}),
    "tip": (tip, {"size": 32}),
}
ROUNDING = 2.0**-8  # of one number in bfloat16, whose significand has 8 bits
# a BatchNorm over the two images of a step makes 1 and -1 of small differences
LOSS = {"promptpar": 16 * ROUNDING}
LOSS["hvit"] = 8 * ROUNDING  # a squared error, which doubles the relative difference of the error


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "dmt, detect")) for n in CASES])
def test_a_paper_trains_and_predicts_in_float32_and_bfloat16(name, monkeypatch, tmp_path):
    """Losses and outputs differ by a few roundings of bfloat16; outputs are in float32."""

    def found(precision: str) -> tuple[Tensor, Tensor | None, bool]:
        p, kinds = parameters(slug, **usual | changes, precision=precision), set()
        with register_module_forward_hook(lambda module, given, output: kinds.add(getattr(output, "dtype", None))):
            history, outputs = case(recipe, p, tmp_path / precision)
        return torch.tensor([row["loss"] for row in history]), outputs, torch.bfloat16 in kinds

    (case, changes), slug = CASES[name], name.partition(",")[0]
    recipe = shrink(slug, monkeypatch)
    usual = {"profile": "paper", "dry_run": True, "accelerator": "cpu", "data_root": "nowhere"}
    (full, expected, no), (half, outputs, yes) = found("32-true"), found("bf16-mixed")
    assert yes and not no and len(full) == 2 and full.isfinite().all()
    torch.testing.assert_close(half, full, rtol=LOSS.get(name, 4 * ROUNDING), atol=0)
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
