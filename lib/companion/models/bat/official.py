"""BAT and OSTrack under the authors' names, and their files (SparkTempest/BAT at ccf9b2f, botaoye/OSTrack)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ... import backbones
from ...errors import BadParameter, MissingWeights

STAGES = {"attention": "adap_t", "mlp": "adap2_t"}  # of a block: the authors' name of the adapter, A1 or A2
ADAPTERS = [
    (rf"^adapters\.(\d+)\.{ours}\.", rf"backbone.blocks.\1.{theirs}.adapter_") for ours, theirs in STAGES.items()
]


def ostrack_file(given: str, data_root: str | Path, dry_run: bool) -> str | Path:
    """The weights of `foundation`: the given ones, or OSTrack's file in `data_root`/weights, without which those of a
    dry run are random."""
    usual = Path(data_root) / "weights" / "OSTrack_ep0300.pth.tar"
    if dry_run and not (given or usual.is_file()):
        print(f"no {usual}; random weights in this dry run")
        return "random"
    return given or (usual if usual.is_file() else "pretrained")


def released(checkpoint: str, method: str = "BAT") -> Mapping[str, Tensor]:
    """The tensors of a file of the authors. Raises `BadParameter` for another method, `MissingWeights`."""
    if method != "BAT":
        raise BadParameter("method", method, ["BAT with a checkpoint: it holds BAT's weights"])
    if not Path(checkpoint).is_file():
        ways = [
            "give the path of BAT_rgbt.pth, which the README of github.com/SparkTempest/BAT links",
            "leave `checkpoint` empty to train",
        ]
        raise MissingWeights("BAT_rgbt", checkpoint, ways)
    return backbones.read_state(checkpoint)
