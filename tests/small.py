"""Small models instead of the full-size ones of the `paper` profile, for dry runs within seconds; few images in the
synthetic datasets.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType, SimpleNamespace

import pytest
import timm
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, set_model_preprocess_cfg
from timm.models.vision_transformer import VisionTransformer

from companion.toy import encoders
from companion.toy.datasets import collage, detection, domains, pedestrians, slides, tracking
from companion.toy.datasets.tokens import Tokenizer


def few_images(patch: pytest.MonkeyPatch) -> None:
    """The synthetic datasets that take long are written with few images a split from now on."""
    for module in (collage, detection, pedestrians):
        patch.setattr(module, "COUNTS", {"train": 160, "val": 40, "test": 40})
    patch.setattr(slides, "COUNTS", {"train": 24, "val": 6, "test": 6})
    patch.setattr(domains, "EACH", {"train": 16, "val": 2, "test": 4})  # of each of 16 classes
    patch.setattr(tracking, "SEQUENCES", {"train": 3, "val": 1, "test": 2})


def shrink(slug: str, patch: pytest.MonkeyPatch) -> ModuleType:
    """The recipe of a paper, whose models are small from now on and whose loaders start no processes."""
    recipe = pytest.importorskip(f"companion.models.{slug}.recipe")
    globals()[f"_{slug}"](recipe, patch)
    if hasattr(recipe, "WORKERS"):
        patch.setattr(recipe, "WORKERS", 0)
    return recipe


def _bat(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    from companion.toy.encoders import tracker

    patch.setattr(recipe.bat, "foundation", lambda weights: tracker.build())
    patch.setattr(recipe, "BATCH", 4)


def _dmt(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    depth, whole = {"tiny": 4, "small": 4, "base": 2}, recipe.vit.build

    def build(size: str, **options: object) -> torch.nn.Module:
        return recipe.ViT(224, 16, 48, depth[size], 4, **options) if size in depth else whole(size, **options)

    patch.setattr(recipe, "SIZES", {"detect": 256, "segment": 128})
    patch.setattr(recipe.vit, "build", build)
    patch.setattr(recipe.dmt_teachers, "build", build)


def _dplq(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """The toy CLIP, whose image tower has 6 blocks."""
    published = recipe.published_settings
    patch.setattr(recipe, "published_settings", lambda protocol: published(protocol) | {"prompt depth": 3})
    patch.setattr(recipe, "_clip", lambda p, weights: encoders.build("pocket_clip"))
    patch.setattr(recipe.open_clip, "get_tokenizer", lambda name: Tokenizer())
    domain = recipe._domain_model
    # a dry run's have random weights
    small = {"random": "clip"}
    patch.setattr(recipe, "_domain_model", lambda name, source, clip: domain(small.get(source, name), source, clip))


NARROW = {"width": 48, "depth": 1, "heads": 2, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}
NARROW |= {"text_width": 48, "text_depth": 1, "text_heads": 2}  # of ECAMP


def _ecamp(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    def encoder(p: object) -> VisionTransformer:
        torch.manual_seed(0)
        return VisionTransformer(img_size=224, embed_dim=48, depth=1, num_heads=2, num_classes=0, global_pool="")

    patch.setattr(recipe, "encoder", encoder)
    patch.setitem(recipe.ecamp.SIZES, "paper", NARROW)


def _hvit(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recipe, "BATCH", 4)


def _metasegnet(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    from companion.models.metasegnet.model import SIZES, swin
    from companion.models.metasegnet.text import Words

    text_encoder = recipe.text_encoder

    def words(p, prompts):  # type: ignore[no-untyped-def]
        if p.method == "one-hot zone":
            return text_encoder(SimpleNamespace(**vars(p) | {"dry_run": True}), prompts)
        return Words.of(prompts.texts(list(prompts.zones)), length=64) if recipe.LEVELS[p.method] else None

    patch.setitem(SIZES, "paper", SIZES["pocket"])
    patch.setattr(recipe, "DRY_SIDE", 64)
    patch.setattr(recipe.backbones, "build", lambda name, weights: swin(**SIZES["pocket"]["swin"]))
    patch.setattr(recipe, "text_encoder", words)


def small_backbones(embed: int = 64) -> tuple[CLIP, VisionTransformer]:
    """PromptPAR's CLIP and fusion."""
    torch.manual_seed(3)
    vision = CLIPVisionCfg(2, 64, 32, patch_size=8, image_size=64)
    clip = CLIP(embed, vision, CLIPTextCfg(16, 64, width=64, heads=1, layers=2), quick_gelu=True).eval()
    return clip, VisionTransformer(img_size=16, embed_dim=64, depth=1, num_heads=1, num_classes=0)


def _promptpar(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recipe, "_backbones", lambda p, clip, fusion: small_backbones())
    patch.setattr(recipe.open_clip, "get_tokenizer", lambda name: Tokenizer())


def _sa2vp(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    build = recipe.backbones.build

    def small(name: str, *args: object, **options: object) -> torch.nn.Module:
        counted = torch.get_default_device().type == "meta"  # the parameters of the full-size models
        photographs = name == "vit_small_patch14_dinov2"  # the real encoder's own section, which trains nothing
        return build(name, *args, **options) if counted or photographs else encoders.build("pocket_vit")

    patch.setattr(recipe.backbones, "build", small)


def small_clip() -> CLIP:
    """SIC-CADS' teacher."""
    torch.manual_seed(3)
    vision = CLIPVisionCfg(1, width=32, head_width=16, patch_size=16, image_size=32)
    model = CLIP(24, vision, CLIPTextCfg(77, 49408, width=16, heads=2, layers=1)).eval()
    set_model_preprocess_cfg(model, {"size": (32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3})
    return model


def _sic_cads(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    from tests.test_detectors import owl

    def build(name: str, weights: object = "pretrained", **options: object) -> torch.nn.Module:
        if name.startswith("openclip:"):
            return small_clip()
        return timm.create_model("resnet10t", channels=(8, 16, 24, 32), stem_width=8, num_classes=0)

    whole = recipe.recipe
    # at 64 pixels P6 is one pixel, for which the CPU's bfloat16 convolution computes gradients of unset memory
    patch.setattr(recipe, "recipe", lambda *names, **options: dataclasses.replace(whole(*names, **options), size=128))
    patch.setattr(recipe.backbones, "build", build)
    patch.setattr(recipe.detectors, "build", lambda name, names, weights: owl("owlvit", list(names)))
    patch.setattr(recipe, "SHORTER", 64)


WORDS = ["generated", "image", "number", "deblur", "denoise", "dejpeg", "upsample", "to", "with", "sigma", "quality"]


def small_pipe(size: str = "pocket", **options: object) -> torch.nn.Module:
    """TIP's pipeline."""
    from companion.models.tip import build

    torch.manual_seed(0)
    return build("pocket", WORDS, text={"length": 96}, **options)


def _tip(recipe: ModuleType, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recipe, "build", small_pipe)
    patch.setattr(recipe, "DRY_SIZE", 32)
