"""The authors' names and sizes of SIC-CADS' image-level model, and the loading of trained weights, theirs and ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

from ... import backbones
from ...errors import MissingWeights
from ...io.config import configure
from ..layers.state_dicts import OfficialModel, below, depth, load_official

Model = TypeVar("Model", bound=OfficialModel)
WHAT = "SIC-CADS' image-level model (ResNet-50)"
CLASSIFIER = "backbone.bottom_up.base.fc."  # of their files, never used
# our names to the authors'
NAMES = (
    (r"^body\.", "backbone.bottom_up.base."),
    (r"^pyramid\.extra_blocks\.", "backbone.top_block."),
    (r"^pyramid\.inner_blocks\.(\d)\.0", lambda level: f"backbone.fpn_lateral{int(level[1]) + 3}"),
    (r"^pyramid\.layer_blocks\.(\d)\.0", lambda level: f"backbone.fpn_output{int(level[1]) + 3}"),
    (r"^heads\.shared", "mlr_lin"),
    (r"^heads\.to_text", "mlr_lin2"),
    (r"^heads\.to_image", "image_embedding"),
    (r"^teacher\.", "clip_model."),
    (r"^text$", "text_embedding.weight"),
)


def cleaned(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The image-level model of a state dict of the authors' code, in which the detector may be merged."""
    return below(state, "ovmlr_model.") or state


def tower(state: Mapping[str, Tensor]) -> VisionTransformer:
    """CLIP's image tower (QuickGELU) of the size that a state dict has."""
    width, _, patch, _ = state["conv1.weight"].shape
    side = round((len(state["positional_embedding"]) - 1) ** 0.5)
    built = VisionTransformer(
        image_size=side * patch,
        patch_size=patch,
        width=width,
        layers=depth(state, "transformer.resblocks."),
        heads=width // 64,
        mlp_ratio=len(state["transformer.resblocks.0.mlp.c_fc.weight"]) / width,
        output_dim=state["proj"].shape[1],
        act_layer=QuickGELU,
    )
    return configure(built.eval(), {"state": state}, tower)


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a recogniser without vocabulary and teacher: ResNet with its frozen norms, pyramid, heads."""
    return {n: t for n, t in model.state_dict().items() if n != "text" and not n.startswith("teacher.")}


def load(model: Model, path: str | Path) -> Model:
    """The model, in eval mode, with the trained weights of a file, ours or the authors'; its vocabulary stays.

    Raises:
        MissingWeights: no such file.
        CorruptFile, BadCheckpoint: it cannot be read, or holds another model.
    """
    if not Path(path).is_file():
        ways = [
            "the authors never released theirs; train one (leave `checkpoint` empty): its weights are in `trained`",
            "set branch = 'visual+', which needs no training",
        ]
        raise MissingWeights("SIC-CADS' recogniser", path, ways)
    state, ours = cleaned(backbones.read_state(path)), trained_weights(model)
    if "text_embedding.weight" in state:  # the authors' names
        names = {name: theirs for name, theirs in model.official_names().items() if name in ours}
        load_official(model, state, names, WHAT, ignored=("text_embedding.", "clip_model.", CLASSIFIER))
    else:
        load_official(model, state, {name: name for name in ours}, "SIC-CADS' recogniser on a ResNet-50")
    return model.eval()
