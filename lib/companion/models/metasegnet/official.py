"""Names and sizes of GeoSeg's FT-UNetFormer, the author's image-only network, and the loading of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ... import backbones
from ...errors import MissingWeights
from ...training.checkpoints import trained_state
from ..layers.heads import window_side
from ..layers.state_dicts import check_names, load_official, renamed

SWIN = "swin_base_patch4_window7_224.ms_in22k_ft_in1k"
WHAT = "GeoSeg's FT-UNetFormer"
DECODER = (
    (r"^squeeze\.", "pre_conv."),
    (r"^blocks\.(\d)", lambda match: f"b{4 - int(match[1])}"),
    (r"^fusions\.(\d)", lambda match: f"p{3 - int(match[1])}"),
    (r"^refine\.", "p1."),
    (r"^head\.2\.", "segmentation_head.2.0."),
    (r"^head\.", "segmentation_head."),
    (r"attention\.", "attn."),
    (r"mlp\.0\.", "mlp.fc1."),
    (r"mlp\.2\.", "mlp.fc2."),
    (r"\bqkv\.", "qkv.0."),
    (r"\blocal1\.", "local2."),  # theirs: local1 is the 3x3
    (r"\blocal3\.", "local1."),
    (r"\bout\.", "proj."),
    (r"\btable$", "relative_position_bias_table"),
    (r"\blateral\.", "pre_conv."),
    (r"\bshares$", "weights"),
    (r"\bafter\.", "post_conv."),
    (r"\bpixels\.", "pa.0."),
    (r"\bchannels\.0\.", "ca.1."),
    (r"\bchannels\.2\.", "ca.3."),
)
# patch merging belongs to the following stage in timm, to the preceding one in GeoSeg
ENCODER = ((r"^layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample"),)
COMPUTED = ("relative_position_index", "attn_mask", "num_batches_tracked")


def _stored(module: nn.Module) -> Iterable[str]:
    return (name for name in module.state_dict() if not name.endswith(COMPUTED))


def decoder_names(decoder: nn.Module) -> dict[str, str]:
    """Our names -> GeoSeg's, of a decoder or of one of its parts."""
    return renamed(_stored(decoder), DECODER)


def names(model: Any) -> dict[str, str]:
    """Our names -> GeoSeg's, of a `MetaSegNet`'s encoder, norms and decoder; text encoder and fusion have none."""
    encoder, decoder = renamed(_stored(model.encoder), ENCODER), decoder_names(model.decoder)
    official = {f"encoder.{ours}": f"backbone.{theirs}" for ours, theirs in encoder.items()}
    official |= {f"norms.{name}": f"backbone.norm{name}" for name in model.norms.state_dict()}
    return official | {f"decoder.{ours}": f"decoder.{theirs}" for ours, theirs in decoder.items()}


def cleaned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without computed buffers, index tables, masks, counters of batches, and without Lightning's "net."
    in its names."""
    return {name.removeprefix("net."): t for name, t in state.items() if not name.endswith(COMPUTED)}


def decoder_sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """The decoder's arguments of `MetaSegNet`, from the official tensors."""
    names = ("pre_conv.0.weight", "b4.attn.relative_position_bias_table", "segmentation_head.2.0.weight")
    check_names(state, [f"decoder.{name}" for name in names], WHAT)
    squeeze, table, head = (state[f"decoder.{name}"] for name in names)
    return {"classes": len(head), "width": len(squeeze), "heads": table.shape[1], "window": window_side(table)}


def load_swin(model: Any, weights: str = "") -> None:
    """Load an image encoder: timm's released Swin-B (empty), a file of it, or the author's, which has the norms too."""
    state = cleaned(backbones.read_state(weights)) if weights else {}
    state = {f"backbone.{name.removeprefix('backbone.')}": tensor for name, tensor in state.items()}
    if any(name.startswith("backbone.norm0.") for name in state):
        swin = {ours: theirs for ours, theirs in names(model).items() if theirs.startswith("backbone.")}
        load_official(model, state, swin, "the author's Swin")
    else:
        timms = backbones.build(SWIN, weights or "pretrained").state_dict()
        model.encoder.load_state_dict({name: timms[name] for name in model.encoder.state_dict()})


def load(model: Any, path: str | Path) -> None:
    """Load the weights that a training saved; a frozen text encoder is not among them.

    The unimodal network also loads checkpoints of GeoSeg's FT-UNetFormer.

    Raises `MissingWeights`, `CorruptFile`, `BadCheckpoint`."""
    if not Path(path).is_file():
        ways = ["train one (task = 'train', no checkpoint); the paper's was never released"]
        raise MissingWeights("a trained MetaSegNet", path, ways)
    state = backbones.read_state(path)
    if model.text is None and any(name.removeprefix("net.").startswith("backbone.") for name in state):
        load_official(model, cleaned(state), names(model), f"{WHAT} of these classes")
    else:
        ours = {name: name for name in trained_state(model)}
        load_official(model, state, ours, "a MetaSegNet of these classes and texts")
