"""The released files of DMT's teachers. `ViT.from_official` reads their names and sizes.

The teachers follow their official codes, written from scratch and checked against outputs recorded from them: mae at
efb2a80 and moco-v3 at c349e6e of facebookresearch (CC BY-NC 4.0), ibot at da316d8 of bytedance and dino at 7c446df of
facebookresearch (Apache 2.0). That DMT's three teachers are MAE, MoCo v3 and iBOT is inferred from its successor.
"""

from __future__ import annotations

from pathlib import Path

from ...backbones import find_weights, hub_file, read_state
from ...errors import MissingWeights
from .vit import ViT, build

# source of a released ViT-Base/16: position embedding, timm's name or the hub's repository, and its file or link
RELEASED = {
    "MAE": ("mae", "vit_base_patch16_224.mae", "facebookresearch/mae, mae_pretrain_vit_base.pth"),
    "MoCo v3": ("mocov3", "nyu-visionx/moco-v3-vit-b", "facebookresearch/moco-v3, vit-b-300ep.pth.tar"),
    "iBOT": ("learned", "", "bytedance/ibot, vitb_16/checkpoint_teacher.pth"),
    "DINO": ("learned", "vit_base_patch16_224.dino", "facebookresearch/dino, dino_vitbase16_pretrain.pth"),
}


def released(name: str, weights: str | Path = "pretrained") -> ViT:
    """A teacher at paper size, ViT-Base/16, by its name in `RELEASED`, in eval mode.

    Args:
        weights: "pretrained": timm's release of MAE and DINO; of MoCo v3 an unofficial mirror on the hub; iBOT has
            neither. "random" (torch's current seed), or an official file.

    Raises:
        MissingWeights: they are not cached.
        CorruptFile, BadCheckpoint: the file is missing, cannot be read, or is of another model.
    """
    positions, pretrained, source = RELEASED[name]
    if weights == "random":
        return build("base", positions=positions).eval()
    if weights != "pretrained":
        path = Path(weights)
    elif not pretrained:
        raise MissingWeights(f"{name}, ViT-Base/16", Path(), [f"the file of {source}: give its path as weights"])
    elif pretrained.startswith("vit_"):
        path = find_weights(pretrained)
    else:
        path = hub_file(name, pretrained, ["model.safetensors"], download=False)
    return ViT.from_official(read_state(path), what=f"{name}, ViT-Base/16")
