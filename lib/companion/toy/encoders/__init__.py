"""Small encoders trained on the synthetic datasets; their weights and model cards are part of the package.

    build("pocket_vit")                      a 0.6 MB ViT, offline
    build("pocket_clip", "random")           the CLIP of the same size, untrained

`tools/encoders` in the repository trains them; the command is in the model card.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, set_model_preprocess_cfg
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ...backbones import load_weights
from ...errors import BadParameter, CorruptFile, MissingWeights, check_choice
from ...io.config import configure

WEIGHTS = Path(__file__).parent / "weights"


def _pocket_vit(**overrides: Any) -> VisionTransformer:
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 6, "num_heads": 4, "mlp_ratio": 3}
    model = VisionTransformer(**{**shape, "num_classes": 0, **overrides})
    model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "classifier": "head"}
    return model


def _pocket_clip(**overrides: Any) -> CLIP:
    # the image tower has the small ViT's shape, because its training starts from it
    image = CLIPVisionCfg(image_size=32, patch_size=4, width=48, layers=6, head_width=12, mlp_ratio=3, no_ln_pre=True)
    text = CLIPTextCfg(context_length=16, vocab_size=64, width=64, heads=4, layers=2, mlp_ratio=3)
    model = CLIP(**{"embed_dim": 64, "vision_cfg": image, "text_cfg": text, **overrides})
    set_model_preprocess_cfg(model, {"size": (32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3})
    return model


def _pocket_pedestrian_clip(**overrides: Any) -> CLIP:
    # like the released CLIPs it has a norm before its blocks; the shared space has the small ViT's width
    image = CLIPVisionCfg(image_size=(64, 32), patch_size=8, width=64, layers=4, head_width=16, mlp_ratio=3)
    text = CLIPTextCfg(context_length=24, vocab_size=64, width=48, heads=4, layers=2, mlp_ratio=3)
    model = CLIP(**{"embed_dim": 48, "vision_cfg": image, "text_cfg": text, **overrides})
    set_model_preprocess_cfg(model, {"size": (64, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3})
    return model


_ENCODERS = {"pocket_vit": _pocket_vit, "pocket_clip": _pocket_clip, "pocket_pedestrian_clip": _pocket_pedestrian_clip}


def read_card(name: str) -> dict:
    """The YAML front matter of a shipped encoder's model card: licence, data, command, sha256, measured quality."""
    text = (WEIGHTS / f"{name}.md").read_text(encoding="utf-8")
    return yaml.safe_load(text.split("---\n")[1])


def weights_file(name: str) -> Path:
    """The path of an encoder's shipped weights; checks their hash.

    Raises:
        MissingWeights: they are missing from the package.
        CorruptFile: they differ from the hash recorded in their model card.
    """
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        raise MissingWeights(name, WEIGHTS, ["install the package again"])
    if hashlib.sha256(path.read_bytes()).hexdigest() != read_card(name)["sha256"]:
        raise CorruptFile(path, f"its sha256 is not the one in {name}.md: get both files again")
    return path


def build(name: str, weights: str | Path = "shipped", **overrides: Any) -> nn.Module:
    """Build a small encoder in eval mode.

    Args:
        name: "pocket_vit", "pocket_clip" or "pocket_pedestrian_clip".
        weights: "shipped", "random" (torch's current seed) or a file.
        overrides: passed to the model; without `num_classes` the ViT has no classifier.

    Raises:
        BadParameter: unknown name or `weights`.
        CorruptFile: a file that cannot be read, or shipped weights that differ from the hash in their model card.
        BadCheckpoint: weights that do not match the model.
    """
    check_choice("name", name, _ENCODERS)
    model = _ENCODERS[name](**overrides)
    if weights != "random":
        path = weights_file(name) if weights == "shipped" else Path(weights)
        if not path.is_file():
            raise BadParameter("weights", str(weights), "'shipped', 'random' or an existing file")
        load_weights(model, path, name)
    return configure(model.eval(), {"name": name, **overrides}, build)
