"""Half precision: a training step and an evaluation of every paper under bf16 autocast, next to float32."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from companion.models.dmt.model import relation_maps
from companion.models.layers.clip_prompting import similarity
from companion.models.sic_cads.model import Heads, ZeroShotClassifier
from companion.toy import encoders
from companion.training.fit import Hardware, predict
from tests.conftest import parameters
from tests.small import shrink

Found = tuple[list[dict], Tensor | None]
"""The history of two steps, and outputs of the untrained model in an evaluation."""


def sa2vp(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    found = recipe.setting(p, out)
    outputs = predict(found.build(p.method), found.test, hardware=found.options["hardware"])
    return recipe.train(found, p.method)[1], outputs


def bat(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    found = recipe.setting(p, out)
    boxes = found.track(p.method, recipe.build(p.method, recipe.bat.foundation("random"), p.seed))
    return found.train(p.method)[1], torch.from_numpy(boxes["generated 1"])


def dplq(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    found = recipe.setting(p, out)
    torch.manual_seed(0)  # the noise of the prompts
    outputs = predict(found.build(p.method), found.inputs(p.method, "source"), hardware=found.options["hardware"])
    return recipe.train(found, p.method)[1], outputs


def promptpar(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    found = recipe.setting(p, out)
    outputs = found.probabilities(found.build(p.method), found.parts["test"])
    return found.train(p.method)[1], outputs


def hvit(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    found = recipe.setting(p, out)
    outputs = recipe.outputs(recipe.build(p, p.method), found.test, Hardware.of(p, "hvit"))[1]
    return recipe.train(found, p.method)[1], outputs


def ecamp(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    if p.task == "pre-train":
        found = recipe.setting(p, out)
        return found.learn(found.build(p.method), p.method), None
    found = recipe.downstream(p, out)
    torch.manual_seed(0)
    model = found.build()
    ((outputs, _),) = recipe._outputs(p, model, found.data["test"])
    flat = [x.flatten() for x in outputs] if isinstance(outputs, list) else [outputs.flatten()]
    return found.learn(model), torch.cat(flat)


def sic_cads(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    found = recipe.setting(p, out)
    torch.manual_seed(0)
    outputs = recipe.predict(found, found.build())
    assert outputs.boxes[0].dtype == outputs.probabilities[0].dtype == torch.float32
    held = recipe.refined(found, outputs, 0)
    outputs.probabilities.clear()
    assert torch.equal(recipe.refined(found, outputs, 0), held), "detected again as before"
    torch.manual_seed(0)
    return recipe.train(found)[1], outputs.p[p.branch]


def metasegnet(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    found = recipe.setting(p, out)
    shares = recipe.matrix(found, found.build(p.method), p.method, "test").double()
    return recipe.train(found, p.method)[1], shares / shares.sum()


def dmt(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    if p.task == "distil":
        found = recipe.setting(p, out)
        return found.learn(found.build("DMT"), "DMT"), None
    found = recipe.downstream(p)
    model = found.build()
    scores = found.score(model)
    assert all(score == score for score in scores.values())
    return found.learn(model), None


def tip(recipe: ModuleType, p: SimpleNamespace, out: Path) -> Found:
    pipe, p.dry_run = recipe.build(p.base), False
    data = recipe.samples(recipe.Generated(4, p.size, 0), p.size, p.method, 0)
    hardware = Hardware.of(p, "tip")
    outputs = recipe.restore(pipe, [data[i] for i in range(2)], steps=2, hardware=hardware)
    return recipe.train(p, pipe, data, epochs=1, batch=2), outputs


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
    "dmt, distil": (dmt, {"losses": "with relations"}),
    "dmt, fine-tune": (dmt, {"task": "fine-tune"}),
    "dmt, linear probe": (dmt, {"task": "linear probe"}),
    "dmt, detect": (dmt, {"task": "detect"}),
    "dmt, segment": (dmt, {"task": "segment"}),
    "tip": (tip, {"size": 32}),
}
# a BatchNorm over the two images of a step makes 1 and -1 of small differences
LOSS = {"promptpar": 0.05}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "dmt, detect")) for n in CASES])
def test_a_paper_trains_and_predicts_under_bfloat16(name, monkeypatch, tmp_path):
    """The losses of two steps within 1 % of those in float32; outputs within 3 % of the largest."""
    (case, changes), slug = CASES[name], name.partition(",")[0]
    recipe = shrink(slug, monkeypatch)
    usual = {"profile": "paper", "dry_run": True, "accelerator": "cpu", "data_root": "nowhere"}
    (full, expected), (half, outputs) = (
        case(recipe, parameters(slug, **usual | changes, precision=precision), tmp_path)
        for precision in ("32-true", "bf16-mixed")
    )
    losses = [torch.tensor([row["loss"] for row in history]) for history in (half, full)]
    assert not torch.equal(*losses)
    torch.testing.assert_close(*losses, rtol=LOSS.get(name, 0.01), atol=0)
    if expected is not None:
        assert not torch.equal(outputs, expected)
        torch.testing.assert_close(outputs, expected, rtol=0, atol=0.03 * float(expected.abs().max()))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


SHIELDED: dict[str, Callable[[], tuple[Tensor, ...]]] = {
    "similarity of CLIP": lambda: (similarity(encoders.build("pocket_clip"), draw(4, 64), draw(5, 64)),),
    "relation maps": lambda: relation_maps(draw(3, 2, 4, 17, 12)),
    "heads of SIC-CADS": lambda: Heads(24, 16)([draw(2, 24, 8, 8)]),
    "classifier of SIC-CADS": lambda: (ZeroShotClassifier(24, draw(5, 16))(draw(3, 24)),),
}


@torch.no_grad()
@pytest.mark.parametrize("name", SHIELDED)
def test_what_half_precision_would_spoil_is_in_float32(name):
    """The same features give the same numbers under autocast."""
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(SHIELDED[name]())
    assert all(x.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(*found, strict=True))
