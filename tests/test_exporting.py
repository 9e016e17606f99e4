"""Exported programs: for any batch size they give the model's outputs; refusals give the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import companion
from companion import saving
from companion.errors import CompanionError
from tests.models.common import refuses
from tests.test_saving import trained

TEXT = "hot dry sand"
MODELS = ("SA²VP", "SA²VP on a Swin", "PromptPAR", "MetaSegNet", "BAT", "ECAMP's segmenter")


def run(path: Path, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """The outputs of an exported program, without this package."""
    if path.suffix == ".pt2":
        found = torch.export.load(path).module()(*inputs)
        return [found] if isinstance(found, torch.Tensor) else list(found)
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
    given = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(output) for output in session.run(None, given)]


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["VPT", *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS)])
def test_a_program_gives_the_models_outputs_at_any_batch(name: str, suffix: str, tmp_path: Path) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
    model, path, text = trained(name).float(), tmp_path / f"model{suffix}", TEXT if name == "MetaSegNet" else None
    assert companion.export(model, path, text=text, size=64) == path and list(tmp_path.iterdir()) == [path]
    for count in (1, 5):
        shapes = saving.export_inputs(model, 64).values()
        inputs = tuple(torch.randn(count, *shape, generator=torch.Generator().manual_seed(5)) for shape in shapes)
        with torch.no_grad():
            expected = model(*inputs, [TEXT]) if text else saving.Program(model)(*inputs)
            expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
            for ours, theirs in zip(run(path, inputs), expected, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_exported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, dplq = tmp_path / "m.pt2", trained("DPLQ")
    dplq.noise = "always"
    refuses(
        (lambda: companion.export(trained("MLR"), out), "MLR"),
        (lambda: companion.export(dplq, out), "always"),  # its predictions are random
        (lambda: companion.export(trained("MetaSegNet"), out), "None"),
        (lambda: companion.export(trained("VPT"), out, text="a"), "MetaSegNet"),
        (lambda: companion.export(trained("VPT"), tmp_path / "m.pth"), ".pth"),
    )
    monkeypatch.setattr(saving.torch, "allclose", lambda *args, **options: False)
    refuses((lambda: companion.export(trained("VPT"), out), "VPT differs"), error=CompanionError)
    assert not list(tmp_path.iterdir())
