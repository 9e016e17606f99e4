"""Small models instead of the full-size ones of the `paper` profile, for dry runs within seconds; few images in the
synthetic datasets.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, set_model_preprocess_cfg
from timm.models.vision_transformer import VisionTransformer

from companion.toy import bat, dmt, dplq, encoders, hvit, promptpar, sic_cads
from companion.toy.tokens import Tokenizer


def few_images(patch: pytest.MonkeyPatch) -> None:
    """The synthetic datasets that take long are written with few images a split from now on."""
    for module in (sic_cads, dmt, promptpar):
        patch.setattr(module, "COUNTS", {"train": 160, "val": 40, "test": 40})
    patch.setattr(hvit, "COUNTS", {"train": 24, "val": 6, "test": 6})
    patch.setattr(dplq, "EACH", {"train": 16, "val": 2, "test": 4})  # of each of 16 classes
    patch.setattr(bat, "VIDEOS", {"train": 3, "val": 1, "test": 2})


def shrink(slug: str, patch: pytest.MonkeyPatch) -> ModuleType:
    """The recipe of a paper, whose models are small from now on and whose loaders start no processes."""
    recipe = pytest.importorskip(f"companion.models.{slug}.recipe")
    globals()[f"_{slug}"](recipe, patch)
    if hasattr(recipe, "WORKERS"):
        patch.setattr(recipe, "WORKERS", 0)
    return recipe


def _bat(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    from companion.toy.encoders import tracker

    patch.setattr(recipe, "foundation", lambda weights: tracker.build())
    patch.setattr(recipe, "BATCH", 4)


def _dmt(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    depth, whole = {"tiny": 4, "small": 4, "base": 2}, recipe.vit.build

    def build(size: str, **options: object) -> torch.nn.Module:
        return recipe.ViT(224, 16, 48, depth[size], 4, **options) if size in depth else whole(size, **options)

    patch.setattr(recipe, "SIZES", {"detect": 128, "segment": 128})
    few = {"rpn_post_nms_top_n_train": 64, "rpn_post_nms_top_n_test": 16, "box_batch_size_per_image": 32}
    patch.setattr(recipe.down, "MaskRCNN", functools.partial(recipe.down.MaskRCNN, **few, box_detections_per_img=4))
    patch.setattr(recipe.vit, "build", build)
    patch.setattr(recipe.official, "build", build)


def _dplq(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """The toy CLIP, whose image tower has 6 blocks."""
    published = recipe.published_settings
    patch.setattr(recipe, "published_settings", lambda protocol: published(protocol) | {"prompt depth": 3})
    patch.setattr(recipe, "_clip", lambda weights: encoders.build("pocket_clip"))
    patch.setattr(recipe.open_clip, "get_tokenizer", lambda name: Tokenizer())
    domain = recipe.domain_model
    # a dry run's have random weights
    small = {"random": "clip"}
    patch.setattr(recipe, "domain_model", lambda name, source, clip: domain(small.get(source, name), source, clip=clip))


def _ecamp(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    from companion.models.ecamp import detection, heads
    from companion.models.ecamp.model import Bert, Blocks

    def encoder(p: object) -> VisionTransformer:
        torch.manual_seed(0)
        return VisionTransformer(img_size=224, embed_dim=48, depth=1, num_heads=2, num_classes=0, global_pool="")

    text = Bert(width=48, depth=1, heads=2, length=16)
    narrow = {"encoder": Blocks(48, 1, 2), "decoder": Blocks(32, 1, 2), "text": text}
    patch.setattr(recipe, "encoder", encoder)
    patch.setattr(recipe, "ReportPairs", functools.partial(recipe.ReportPairs, length=16))
    patch.setattr(heads, "Segmenter", functools.partial(heads.Segmenter, channels=(32, 16, 8, 8)))
    patch.setattr(detection, "Detector", functools.partial(detection.Detector, channels=(64, 32, 16)))
    patch.setitem(recipe.ecamp.SIZES, "paper", narrow)


def _hvit(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recipe, "BATCH", 4)


def _metasegnet(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    from companion.models.metasegnet.model import SIZES, swin
    from companion.models.metasegnet.prompts import LEVELS
    from companion.models.metasegnet.text import Words

    text_encoder = recipe.text_encoder

    def words(method, prompts, *args, **kwargs):  # type: ignore[no-untyped-def]
        if LEVELS[method] in (None, "code"):
            return text_encoder(method, prompts)
        return Words.of(prompts.texts(list(prompts.zones)), length=64)

    patch.setitem(SIZES, "paper", SIZES["pocket"])
    published = recipe.published
    patch.setattr(recipe, "published", lambda dataset: dataclasses.replace(published(dataset), crop=64))
    patch.setattr(recipe.backbones, "build", lambda name, weights: swin(**SIZES["pocket"]["swin"]))
    patch.setattr(recipe, "text_encoder", words)


def small_backbones(embed: int = 64) -> tuple[CLIP, VisionTransformer]:
    """PromptPAR's CLIP and fusion."""
    torch.manual_seed(3)
    vision = CLIPVisionCfg(2, 64, 32, patch_size=8, image_size=64)
    clip = CLIP(embed, vision, CLIPTextCfg(16, 64, width=64, heads=1, layers=2), quick_gelu=True).eval()
    return clip, VisionTransformer(img_size=16, embed_dim=64, depth=1, num_heads=1, num_classes=0)


def _promptpar(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recipe, "_backbones", lambda p: small_backbones())
    patch.setattr(recipe.open_clip, "get_tokenizer", lambda name: Tokenizer())


def _sa2vp(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    build = recipe.backbones.build

    def small(name: str, *args: object, **options: object) -> torch.nn.Module:
        counted = torch.get_default_device().type == "meta"  # the parameters of the full-size models
        photographs = name == "vit_small_patch14_dinov2"  # the real encoder's own section, which trains nothing
        if counted or photographs:
            return build(name, *args, **options)
        if name == "swin_b":
            sizes = {"embed_dim": 16, "depths": (1, 1, 6, 1), "num_heads": (1, 2, 4, 8)}
            return timm.create_model("swin_base_patch4_window7_224", num_classes=0, **sizes, **options).eval()
        return encoders.build("pocket_vit")

    patch.setattr(recipe.backbones, "build", small)


def small_clip() -> CLIP:
    """SIC-CADS' teacher."""
    torch.manual_seed(3)
    vision = CLIPVisionCfg(1, width=32, head_width=16, patch_size=16, image_size=32)
    model = CLIP(24, vision, CLIPTextCfg(77, 49408, width=16, heads=2, layers=1)).eval()
    set_model_preprocess_cfg(model, {"size": (32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3})
    return model


def _sic_cads(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    from tests.models.sic_cads.test_detectors import owl

    def build(name: str, weights: object = "pretrained", **options: object) -> torch.nn.Module:
        if name.startswith("openclip:"):
            return small_clip()
        return timm.create_model("resnet10t", channels=(8, 16, 24, 32), stem_width=8, num_classes=0)

    whole = recipe.published
    # at 64 pixels P6 is one pixel, for which the CPU's bfloat16 convolution computes gradients of unset memory
    patch.setattr(recipe, "published", lambda *args, **kwargs: dataclasses.replace(whole(*args, **kwargs), size=128))
    patch.setattr(recipe.backbones, "build", build)
    patch.setattr(recipe.detectors, "build", lambda name, names, weights: owl("owlvit", list(names)))
    patch.setattr(recipe, "SHORTER", 64)


SMALL_SD: dict[str, Any] = {  # two levels instead of Stable Diffusion's four
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (32, 48),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
    "vae": {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "scaling_factor": 0.18215,
    },
    "text": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "conditioning_channels": (16, 24, 32),
}


def small_pipe(size: str = "sd15", **options: object) -> torch.nn.Module:
    """TIP's pipeline, which predicts x0 and starts from noise alone."""
    from companion.models.tip import build
    from companion.toy.encoders.texture_prior import scheduler

    torch.manual_seed(0)
    pipe = build("sd15", **SMALL_SD | options)
    pipe.register_modules(scheduler=scheduler())
    return pipe


def _tip(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recipe, "build", small_pipe)
    patch.setattr(recipe, "DRY_SIZE", 32)


def pinned(*values: object) -> str:
    """A hash of arrays, tensors (to three decimals) and other values."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            value = (value.double() * 1000).round().long().numpy()
        array = isinstance(value, np.ndarray)
        digest.update(repr((str(value.dtype), value.shape) if array else value).encode())
        digest.update(np.ascontiguousarray(value).tobytes() if array else b"")
    return digest.hexdigest()[:12]
