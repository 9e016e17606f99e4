"""The domain models of DPLQ, and the files of their authors: Remote-Sensing-RVSA's MAE and MedSAM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from open_clip.model import CLIP
from torch import Tensor, nn

from ... import backbones
from ...errors import MissingWeights
from ..layers import mae
from ..layers.state_dicts import load_official, renamed
from .model import CLIPFeatures, DomainModel, MAEFeatures, NoFeatures

MEDSAM = "wanglab/medsam-vit-base"


def domain_model(name: str, weights: str | Path = "pretrained", *, clip: CLIP, download: bool = False) -> nn.Module:
    """A frozen domain model by name, images to features (b, F), for DPLQ's `domain`.

    Args:
        name: "remote-sensing", the MAE ViT-B/16 of ViTAE-Transformer/Remote-Sensing-RVSA (F = 512; the authors' other
            choice, its ViTAE sibling, is not here); "medical", MedSAM's image encoder (F = 256); the controls "clip",
            CLIP's own feature, and "none", zeros; or any name accepted by `backbones.build`, for instance
            "vit_base_patch16_224.mae".
        weights: "pretrained", "random", or a file.
        clip: the CLIP that is prompted; images have its size and its normalisation, and are resized (nearest neighbour)
            where the domain model has another size.
        download: download weights that are not cached.

    Raises:
        BadParameter: an unknown name.
        MissingWeights: weights that are not found, with the ways to get them.
        CorruptFile, BadCheckpoint: a file that cannot be read, or is of another model.
    """
    if name == "clip":
        return CLIPFeatures(clip)
    if name == "none":
        return NoFeatures(clip.visual.output_dim)
    if name == "remote-sensing":
        encoder = MAEFeatures(_remote_sensing(weights)).eval()
        size = encoder.model.encoder.patch_embed.img_size[0]
    elif name == "medical":
        encoder, size = _medical(weights, download), 1024
    else:
        encoder = backbones.build(name, weights, download=download)
        size = backbones.input_of(encoder).size
    resized = None if size == backbones.input_of(clip).size else size
    return DomainModel(encoder, resized, batch=1 if name == "medical" else None)


def _remote_sensing(weights: str | Path) -> mae.MAE:
    if weights == "random":
        return mae.MAE(mae.encoder())
    if weights != "pretrained":
        return mae.MAE.from_official(backbones.read_state(weights))
    ways = [
        "vit-b-checkpoint-1599.pth from the README of github.com/ViTAE-Transformer/Remote-Sensing-RVSA (MIT, on a "
        "personal cloud drive), then weights='<file>'; of a run: domain_weights='<file>', or into <data_root>/weights",
        "a stand-in trained on natural images: domain='vit_base_patch16_224.mae', or domain='clip', the control",
    ]
    raise MissingWeights("remote-sensing MAE ViT-B/16", "no copy on a hub was found", ways)


def _medical(weights: str | Path, download: bool) -> nn.Module:
    """MedSAM's image encoder as timm has it: (b, 3, 1024, 1024) to the mean over 64x64 positions, (b, 256)."""
    encoder = backbones.build("samvit_base_patch16", "random")
    if weights == "pretrained":
        weights = backbones.hub_file(MEDSAM, MEDSAM, ["model.safetensors", "pytorch_model.bin"], download)
    if weights != "random":
        load_official(encoder, sam_state(backbones.read_state(weights)), None, "SAM ViT-B's image encoder")
    return encoder


SAM_NAMES = [  # from transformers' and the original release's to timm's
    (r"^(image|vision)_encoder\.", ""),
    ("patch_embed.projection", "patch_embed.proj"),
    (r"^layers\.", "blocks."),
    (r"neck\.conv1", "neck.0"),
    (r"neck\.layer_norm1", "neck.1"),
    (r"neck\.conv2", "neck.2"),
    (r"neck\.layer_norm2", "neck.3"),
    (r"\.layer_norm", ".norm"),
    (r"mlp\.lin", "mlp.fc"),
]


def sam_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image encoder in a state dict of SAM, of the original release or of transformers, under timm's names."""
    of_encoder = [name for name in state if name.startswith(("image_encoder.", "vision_encoder."))]
    return {new: state[name] for name, new in renamed(of_encoder or state, SAM_NAMES).items()}
