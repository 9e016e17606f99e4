"""The self-supervised teachers of DMT: where released ones come from, and the parts of MoCo v3 that MAE and iBOT lack.

    MAE          predicts the pixels of the masked three quarters of patches    `layers.mae` (He et al., CVPR 2022)
    MoCo v3      matches two views of an image among those of a batch           here (Chen et al., ICCV 2021)
    iBOT, DINO   predict the prototypes that an EMA teacher assigns             `layers.dino`

All follow their official codes, written from scratch and checked against outputs recorded from them: mae at
efb2a80 and moco-v3 at c349e6e of facebookresearch (CC BY-NC 4.0), ibot at da316d8 of bytedance and dino at 7c446df of
facebookresearch (Apache 2.0). That DMT's three teachers are MAE, MoCo v3 and iBOT is inferred from its successor.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


# --- released teachers ------------------------------------------------------------------------------------------------


def released(name: str, weights: str | Path = "pretrained", *, download: bool = False) -> ViT:
    """A teacher at paper size, ViT-Base/16, by its name in `RELEASED`, in eval mode.

    Args:
        weights: "pretrained": timm's release of MAE and DINO; of MoCo v3 an unofficial mirror on the hub; iBOT has
            neither. "random" (torch's current seed), or an official file.
        download: download weights that are not in the cache.

    Raises:
        MissingWeights: they are not cached, and downloading is off or fails.
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
        path = find_weights(pretrained, download=download)
    else:
        path = hub_file(name, pretrained, ["model.safetensors"], download)
    return ViT.from_official(read_state(path), what=f"{name}, ViT-Base/16")


# --- MoCo v3's heads and loss -----------------------------------------------------------------------------------------


def mlp(inputs: int, hidden: int, outputs: int, layers: int) -> nn.Sequential:
    """MoCo v3's heads: linear layers without bias, batch norm and ReLU between, a last batch norm without affine."""
    steps: list[nn.Module] = []
    for i in range(layers):
        last = i == layers - 1
        steps.append(nn.Linear(inputs if i == 0 else hidden, outputs if last else hidden, bias=False))
        steps += [nn.BatchNorm1d(outputs, affine=False)] if last else [nn.BatchNorm1d(hidden), nn.ReLU()]
    return nn.Sequential(*steps)


def contrastive_loss(queries: Tensor, keys: Tensor, temperature: float = 0.2) -> Tensor:
    """Cross-entropy of each query (B, E) with its key among all of the batch, times 2 T."""
    q, k = F.normalize(queries.float(), dim=1), F.normalize(keys.float(), dim=1).detach()
    return F.cross_entropy(q @ k.T / temperature, torch.arange(len(q), device=q.device)) * (2 * temperature)
