"""Export of a trained model that runs without this package: torch.export, or ONNX (the extra `[export]`).

    companion.export(model, "flowers.pt2")      torch.export.load("flowers.pt2").module()(images)
    companion.export(model, "flowers.onnx")     onnxruntime.InferenceSession("flowers.onnx").run(None, {"images": ...})

The batch is dynamic, height and width are fixed. Inputs are images after the model's transform.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .backbones import input_of
from .errors import BadParameter, CompanionError, check_choice
from .ops.files import atomic

TOLERANCE = 1e-4  # of the exported program's outputs, relative to the largest
WHY_NOT = {
    "MLR": "it resizes images of any size by their own sizes: export its `body`, or predict with `companion.predict`",
    "HViT": "slides have any number of regions, with a mask: export its `patch` or `region` level's blocks",
    "TIPPipeline": "a sampler runs its networks many times: diffusers exports `unet`, `vae` and `text_encoder` alone",
    "DMT": "it is a training of a student: export the model that `downstream.classifier` makes of it",
    "ECAMP": "it is a pre-training: export a classifier or segmenter of `heads`",
}


def export(model: Any, path: str | Path, *, text: str | None = None, size: int = 512) -> Path:
    """Export a model after comparing the program's outputs with the model's; returns the path.

    Outputs: logits (B, classes); for PromptPAR (B, attributes), for MetaSegNet and ECAMP's segmenter (B, classes, H,
    W); for ECAMP's detector three heads; for BAT score, size, offset and box.

    Args:
        path: ends in .pt2 or .onnx.
        text: for MetaSegNet: the text of one climate zone, which becomes part of the program.
        size: side of MetaSegNet's images; the other models have one size.

    Raises:
        BadParameter: a model that cannot be exported, with the reason; or another `path`.
        CompanionError: the package onnxscript is not installed; or the program's outputs differ from the model's.
    """
    path, kind = Path(path), type(model).__name__
    check_choice("path", path.suffix, (".pt2", ".onnx"))
    if path.suffix == ".onnx" and importlib.util.find_spec("onnxscript") is None:
        raise CompanionError("ONNX needs onnxscript, which is not installed: pip install -e '.[export]'")
    if kind in WHY_NOT or not isinstance(model, nn.Module):
        accepted = WHY_NOT.get(kind, "a model of companion.models")
        raise BadParameter("model", kind, f"one that is a single pass of fixed size; {accepted}")
    if getattr(model, "noise", "off") == "always":
        raise BadParameter("noise", "always", "'train' or 'off': the predictions of this DPLQ are random")
    network = _Network(model, text).eval()
    examples, names = _examples(network.model, size)
    batch = torch.export.Dim("batch", min=1, max=1024)
    given = tuple(torch.cat([x, x.flip(-1)]) for x in examples)  # a batch of 1 would be specialised to a constant
    with torch.no_grad():
        try:
            # strict mode keeps `len(images)` symbolic
            program = torch.export.export(
                network, given, dynamic_shapes=(tuple({0: batch} for _ in given),), strict=True
            )
        except Exception as error:  # torch raises many kinds of errors
            reason = str(error).strip().partition("\n")[0]
            raise BadParameter("model", kind, f"one that torch.export follows: {reason}") from error
        three = tuple(torch.cat([x, 2 * x, x.flip(-1)]) for x in examples)
        for found, expected in zip(_tuple(program.module()(*three)), _tuple(network(*three)), strict=True):
            if not torch.allclose(found, expected, atol=TOLERANCE * float(expected.abs().max())):
                difference = float((found - expected).abs().max())
                raise CompanionError(
                    f"{path} is not written: the exported {kind} differs from the model by {difference:g}"
                )
    with atomic(path) as temporary:
        if path.suffix == ".pt2":
            torch.export.save(program, temporary)
        else:
            torch.onnx.export(program, input_names=names, f=str(temporary), external_data=False)
    return path


class _Network(nn.Module):
    """A model that returns the prediction alone, with its text as a constant."""

    def __init__(self, model: nn.Module, text: str | None):
        super().__init__()
        reads = getattr(model, "text", None) if hasattr(model, "fusions") else None
        if (text is None) != (reads is None):
            accepted = "None: only MetaSegNet reads one" if reads is None else "the text of one climate zone"
            raise BadParameter("text", text, accepted)
        self.model = copy.deepcopy(model)
        if text is not None:
            with torch.no_grad():
                ids = self.model.ids([text])
                self.register_buffer("ids", ids)
                self.model.text = _Encoded(model.text.eval()(ids), model.text.mask(ids))

    def forward(self, *inputs: Tensor) -> Any:
        found = self.model(*inputs, self.ids) if hasattr(self, "ids") else self.model(*inputs)
        if hasattr(found, "score"):  # BAT's maps and box
            return tuple(found)
        # the second output of SA²VP and PromptPAR is for their losses
        return found[0] if isinstance(found, tuple) else found


class _Encoded(nn.Module):
    """An encoded text that replaces its encoder: states (1, L, D), mask (1, L)."""

    def __init__(self, states: Tensor, mask: Tensor):
        super().__init__()
        self.register_buffer("states", states)
        self.register_buffer("words", mask)

    def forward(self, ids: Tensor) -> Tensor:
        return self.states.expand(ids.shape[0], -1, -1)

    def mask(self, ids: Tensor) -> Tensor:
        return self.words.expand(ids.shape[0], -1)


def _examples(model: nn.Module, size: int) -> tuple[list[Tensor], list[str]]:
    """One input of a model, and the names of its parts."""
    generator, sides = torch.Generator().manual_seed(0), [(3, size, size)]
    names = ["images"]
    if hasattr(model, "tracker"):
        sides, names = (
            [(6, side, side) for side in (model.tracker.template, model.tracker.search)],
            ["template", "search"],
        )
    elif hasattr(model, "clip"):
        sides = [(3, *model.clip.visual.image_size)]
    elif not hasattr(model, "fusions"):
        inner = getattr(model, "map", model)  # of ECAMP's heads
        inner = next((getattr(inner, part) for part in ("backbone", "encoder") if hasattr(inner, part)), inner)
        embed = getattr(inner, "patch_embed", None)
        side = getattr(inner, "image", None) or (embed.img_size[0] if embed else input_of(inner).size)
        sides = [(3, side, side)]
    like = next(model.parameters())
    return [torch.randn(1, *side, generator=generator).to(like.device) for side in sides], names


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
