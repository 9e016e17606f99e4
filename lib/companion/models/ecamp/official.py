"""The names of ECAMP's tensors in the authors' code, and the sizes that a state dict of theirs shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...io.papers import paper
from ..layers.state_dicts import OfficialModel, check_names, depth, load_official, renamed

WHAT = "ECAMP: the pre-training model, decoders and BERT included"
NAMES = paper("ecamp")["official_names"]  # patterns from our names to the authors', by model
BERT, HEAD = "bert_encoder.model.bert.", "bert_encoder.model.cls.predictions."


def as_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the names of the release; older files call the fusion layer `cross_attn_layer`.

    transformers stores the bias of the word head under two names, and a counter `position_ids` in older releases.
    """
    state = {name.replace("cross_attn_layer", "context_fusion_layer"): tensor for name, tensor in state.items()}
    bias = state.pop(f"{HEAD}bias", None)
    if bias is not None:
        state.setdefault(f"{HEAD}decoder.bias", bias)
    state.pop(f"{BERT}embeddings.position_ids", None)
    return state


def bert_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sizes of the text decoder, but for its heads, as `model.Bert` names them.

    Raises `BadCheckpoint`: a decoder is missing.
    """
    words, positions = f"{BERT}embeddings.word_embeddings.weight", f"{BERT}embeddings.position_embeddings.weight"
    wide = f"{BERT}context_fusion_layer.intermediate.dense.weight"
    check_names(state, {"decoder_pos_embed", words, positions, wide}, WHAT)
    return {
        "words": len(state[words]),
        "length": len(state[positions]),
        "width": state[words].shape[1],
        "depth": depth(state, f"{BERT}encoder.layer."),
        "hidden": len(state[wide]),
        "pooler": f"{BERT}pooler.dense.weight" in state,
    }


def load_vit(vit: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load the encoder of a state dict, under timm's names, into a ViT; other tensors, such as decoders, are not read.

    Raises `BadCheckpoint`: tensors that are missing or of another shape.
    """
    own = vit.state_dict()
    load_official(vit, {name: tensor for name, tensor in state.items() if name in own}, None, what)


def load_mae(model: OfficialModel, state: Mapping[str, Tensor]) -> None:
    """Initialise an `ECAMP` from a masked autoencoder's state dict, as the paper does.

    Every tensor of the same name and shape is loaded, position embeddings included; BERT keeps its initialisation.
    MAE's image decoder has eight blocks, of which the first ones are loaded; without a decoder only the encoder is
    loaded.

    Raises `BadCheckpoint`: tensors of the encoder that are missing or of another shape.
    """
    load_vit(model.get_submodule("encoder"), state, "the encoder of ECAMP (MAE's names)")
    own = model.state_dict()
    loaded = {ours: state[theirs] for ours, theirs in renamed(own, model.rules).items() if theirs in state}
    loaded = {name: tensor for name, tensor in loaded.items() if tensor.shape == own[name].shape}
    model.load_state_dict(loaded, strict=False)
