"""Exported programs: for any batch size they give the model's outputs; refusals give the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import companion
from companion import exporting
from companion.errors import CompanionError
from tests.models.common import refuses
from tests.small import small_pipe
from tests.test_saving import trained

TEXT = "hot dry sand"
MODELS = ("SA²VP", "SA²VP on a Swin", "PromptPAR", "MetaSegNet", "BAT", "ECAMP's segmenter", "VPT")


def fast(*names: str) -> list:
    """The models as parameters of a test; all but `names` are slow tests."""
    return [pytest.param(name, marks=[] if name in names else pytest.mark.slow) for name in MODELS]


def exported(name: str, path: Path) -> tuple[exporting._Network, tuple[torch.Tensor, ...]]:
    """The network of an exported model, and a batch of five."""
    model = trained(name)
    if name == "PromptPAR":
        model = model.float()
    text = TEXT if name == "MetaSegNet" else None
    assert companion.export(model, path, text=text, size=64) == path and list(path.parent.iterdir()) == [path]
    examples, _ = exporting._examples(model, 64)
    inputs = tuple(torch.randn(5, *x.shape[1:], generator=torch.Generator().manual_seed(5)) for x in examples)
    if name == "MetaSegNet":
        with torch.no_grad():  # the text inside is the one that the model reads
            assert torch.equal(exporting._Network(model, text)(*inputs), model(*inputs, [TEXT]))
    return exporting._Network(model, text).eval(), inputs


@pytest.mark.parametrize("name", fast("SA²VP"))
def test_a_program_gives_the_models_outputs_at_any_batch(name: str, tmp_path: Path) -> None:
    network, inputs = exported(name, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for count in (1, 5):
        with torch.no_grad():
            outputs = [exporting._tuple(f(*(x[:count] for x in inputs))) for f in (program, network)]
        for found, expected in zip(*outputs, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", fast("BAT"))  # several outputs
def test_onnxruntime_gives_the_models_outputs(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network, inputs = exported(name, tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    for count in (1, 5):
        given = {i.name: x[:count].numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
        with torch.no_grad():
            outputs = exporting._tuple(network(*(x[:count] for x in inputs)))
        for found, expected in zip(session.run(None, given), outputs, strict=True):
            np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_what_cannot_be_exported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, dplq = tmp_path / "m.pt2", trained("DPLQ")
    dplq.noise = "always"
    refuses(
        (lambda: companion.export(trained("MLR"), out), "by their own sizes"),
        (lambda: companion.export(trained("H-ViT"), out), "any number of regions"),
        (lambda: companion.export(small_pipe(), out), "sampler"),
        (lambda: companion.export(dplq, out), "random"),
        (lambda: companion.export(trained("MetaSegNet"), out), "the text of one climate zone"),
        (lambda: companion.export(trained("VPT"), out, text="a"), "only MetaSegNet"),
        (lambda: companion.export(trained("VPT"), tmp_path / "m.pth"), ".pt2"),
    )
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    refuses((lambda: companion.export(trained("VPT"), tmp_path / "m.onnx"), "export"), error=CompanionError)
    monkeypatch.setattr(exporting.torch, "allclose", lambda *args, **options: False)
    refuses((lambda: companion.export(trained("VPT"), out), "differs from the model"), error=CompanionError)
    assert not list(tmp_path.iterdir())
