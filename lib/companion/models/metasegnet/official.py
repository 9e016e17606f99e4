"""Names and sizes of GeoSeg's FT-UNetFormer, the author's image-only network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..layers.heads import window_side
from ..layers.state_dicts import check_names, renamed

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
