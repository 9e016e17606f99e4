"""The arguments of the models' constructors at their edges, encoders of every form of timm, and what a call leaves
behind."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn

import companion
from companion import backbones
from companion.errors import BadParameter, CompanionError
from companion.models import bat, dmt, dplq, ecamp, metasegnet, promptpar, sa2vp, sic_cads
from companion.models.bat import baselines as trackers
from companion.models.bat.ostrack import OSTrack
from companion.models.dmt import downstream
from companion.models.dplq import baselines as prompted
from companion.models.ecamp import model as pretraining
from companion.models.hvit import dino, encoders
from companion.models.hvit.model import SlideTransformer
from companion.models.hvit.model import build as build_hvit
from companion.models.layers import classifying, heads, mae
from companion.models.sa2vp import baselines
from companion.toy import encoders as toy
from companion.toy.tokens import Tokenizer
from tests.edges.common import Edge, check
from tests.models.common import draw
from tests.papers.common import hooks, of_all
from tests.test_saving import MODELS, trained

NAMES = ["disc", "ring", "cross"]
PROMPTED = {"classes": NAMES, "template": "a {}."}
ACCEPTED = {"classes": "row less", "template": "' a {}.', 'A {}.'"}


@functools.cache
def vit() -> VisionTransformer:
    return backbones.build("vit_tiny_patch16_224", "random", img_size=32, depth=6, embed_dim=48, num_heads=3)


@functools.cache
def swin() -> nn.Module:
    sizes = {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 6, 1), "window_size": 2}
    return backbones.build("swin_b", "random", **sizes)


@functools.cache
def clip() -> nn.Module:
    return toy.build("pocket_clip")


@functools.cache
def tracker() -> OSTrack:
    return OSTrack(vit(), 32, 64, 32)


@functools.cache
def student() -> dmt.ViT:
    return dmt.ViT(32, 8, 48, 2, 3)


def images(*shape: int) -> Tensor:
    return draw(2, *(shape or (3, 32, 32)))


def on_images(model: nn.Module) -> Any:
    return model.eval()(images())


def on_pairs(model: nn.Module) -> Any:
    return model.eval()(images(6, 32, 32), images(6, 64, 64))


def recogniser(**settings: Any) -> Tensor:
    size = backbones.Input(32, (0.5,) * 3, (0.5,) * 3)
    settings_ = sic_cads.Settings(image_input=size, teacher_input=size, **settings)
    body, text = backbones.build("resnet18", "random"), nn.functional.normalize(draw(4, 64), dim=-1)
    model = sic_cads.MLR(body, text, torch.tensor([False, True, False, False]), settings_, teacher=clip().visual)
    return model.eval().recognise((50 * images(3, 40, 48) + 128).clamp(0, 255).to(torch.uint8)).p


def people(**settings: Any) -> Any:
    settings_ = promptpar.Settings(visual_embed=True, **settings)
    return on_images(promptpar.PromptPAR(clip(), NAMES, Tokenizer(), vit(), settings_))


def land(**options: Any) -> Any:
    sizes = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 2}
    text = metasegnet.Words.of(["wet forest"], length=4)
    return metasegnet.MetaSegNet(metasegnet.swin(**sizes), text=text, **options)(images(3, 64, 64), ["wet forest"])


def chest(encoder: Any = None, text: Any = None, **options: Any) -> Any:
    parts = {"encoder": encoder or pretraining.Blocks(48, 2, 3), "decoder": pretraining.Blocks(16, 1, 2)}
    parts["text"] = text or pretraining.Bert(30, 8, 24, 1, 2, 32)
    model = ecamp.ECAMP(**{"image": 32, "patch": 8, "window": 2} | options, **parts).eval()
    words = torch.zeros(2, 1, dtype=torch.long)
    return model.forward_features(images(3, model.image, model.image)), model.text(words, words + 1, draw(2, 5, 24))[0]


def words(**options: Any) -> Tensor:
    encoder = metasegnet.Words(**options)
    return encoder(encoder.ids(["wet"]))


def edge(call: Callable, of: Callable, given: Mapping[str, Any], accepts: Mapping[str, str], parts: str = "") -> Edge:
    return Edge(call, given, accepts, of, draws=True, parts=frozenset(parts.split()))


EDGES: dict[str, Edge] = {
    "full fine-tuning": edge(
        lambda **k: on_images(classifying.FineTuning(vit(), **k)),
        classifying.FineTuning,
        {"classes": 3},
        {"classes": "1"},
        "backbone",
    ),
    "linear probe": edge(
        lambda **k: on_images(classifying.LinearProbe(vit(), **k)),
        classifying.LinearProbe,
        {"classes": 3},
        {"classes": "1"},
        "backbone",
    ),
    "VPT": edge(
        lambda **k: on_images(baselines.VPT(vit(), **k)),
        baselines.VPT,
        {"classes": 3, "tokens": 8, "deep": True, "dropout": 0.1},
        {"classes": "1", "tokens": "0, 1", "dropout": "0, 1"},
        "backbone",
    ),
    "SA²VP": edge(
        lambda **k: on_images(sa2vp.SA2VP(vit(), **k)),
        sa2vp.SA2VP,
        {"classes": 3, "width": 8, "scale": 0.1, "new_maps": 2, "attention": "padded", "dropout": 0.1},
        {"classes": "1", "width": "1", "scale": "0, -1, 1, 2.5", "new_maps": "0, 1", "dropout": "0, 1"},
        "backbone",
    ),
    "SA²VP on a Swin": edge(
        lambda **k: sa2vp.SA2VPSwin(swin(), **k)(images(3, 64, 64)),
        sa2vp.SA2VPSwin,
        {"classes": 3, "width": 8, "scale": 0.1, "stage": 2, "attention": "aligned", "dropout": 0.1},
        {"classes": "1", "width": "1", "scale": "0, -1, 1, 2.5", "dropout": "0, 1"},
        "backbone",
    ),
    **{
        kind.__name__: edge(
            lambda kind=kind, **k: on_images(kind(clip(), tokenizer=Tokenizer(), **k)),
            kind,
            PROMPTED | more,
            ACCEPTED | accepts,
            "clip tokenizer",
        )
        for kind, more, accepts in (
            (prompted.ZeroShot, {}, {}),
            (prompted.CoOp, {"tokens": 4}, {"tokens": "1"}),
            (prompted.CoCoOp, {"tokens": 4, "hidden": 8}, {"tokens": "1", "hidden": "1, None"}),
            (prompted.MaPLe, {"tokens": 2, "depth": 3}, {"tokens": "1", "depth": "1"}),
        )
    },
    "DPLQ": edge(
        lambda domain, **k: dplq.DPLQ(clip(), tokenizer=Tokenizer(), domain=domain, **k)(images(), draw(2, domain)),
        dplq.DPLQ,
        PROMPTED | {"domain": 64, "tokens": 2, "depth": 3, "hidden": 8, "noise": "off"},
        ACCEPTED | {"domain": "1", "tokens": "1", "depth": "1", "hidden": "1, None"},
        "clip tokenizer",
    ),
    "OSTrack": edge(
        lambda template, search, **k: OSTrack(vit(), template, search, **k)(
            images(3, template, template), images(3, search, search)
        ),
        OSTrack,
        {"template": 32, "search": 64, "head_channels": 32},
        {},
        "vit",
    ),
    "BAT": edge(
        lambda **k: on_pairs(bat.BAT(tracker(), **k)),
        bat.BAT,
        {"width": 8, "dropout": 0.1, "std": 0.02, "elimination": {1: 0.7}},
        {"width": "1", "dropout": "0, 1", "std": "0, 1, 2.5", "elimination": "empty, nothing, more, less, first 0"},
        "tracker",
    ),
    "single stream": edge(
        lambda **k: on_pairs(trackers.SingleStream(tracker(), **k)),
        trackers.SingleStream,
        {"stream": 1},
        {"stream": "0, 1"},
        "tracker",
    ),
    "feature fusion": edge(
        lambda **k: on_pairs(trackers.FeatureFusion(tracker(), **k)),
        trackers.FeatureFusion,
        {"fusion": "sum"},
        {},
        "tracker",
    ),
    "DMT's ViT": edge(
        lambda **k: dmt.ViT(**k)(images(3, k["image"], k["image"])),
        dmt.ViT,
        {
            "image": 32,
            "patch": 8,
            "width": 48,
            "depth": 2,
            "heads": 3,
            "mlp_ratio": 4.0,
            "positions": "mae",
            "masked": False,
        },
        {"patch": "1", "depth": "1", "heads": "1", "mlp_ratio": "1, 2.5"},
        "",
    ),
    "DMT": edge(
        lambda **k: dmt.DMT(student(), **k)(images(), [draw(2, 17, 24), draw(2, 17, 16)]),
        dmt.DMT,
        {
            "teachers": [24, 16],
            "mask_ratio": 0.75,
            "target_norm": "channel",
            "statistics": "batch",
            "token_weight": 1.0,
            "map_weight": 1.0,
            "decoder": "small",
        },
        {"mask_ratio": "0", "token_weight": "0, 1, 2.5", "map_weight": "0, 1, 2.5"},
        "student",
    ),
    "DMT's classifier": edge(
        lambda **k: on_images(downstream.classifier(student(), **k)),
        downstream.classifier,
        {"classes": 3, "drop_path": 0.1},
        {"classes": "1", "drop_path": "0, 1"},
        "vit",
    ),
    "slide level": edge(
        lambda **k: SlideTransformer(**k).eval()(draw(2, 5, k["inputs"])),
        SlideTransformer,
        {
            "inputs": 24,
            "classes": 6,
            "head": "coral",
            "dim": 24,
            "depth": 2,
            "heads": 3,
            "dropout": 0.25,
            "position": "learned",
            "longest": 12,
        },
        {"inputs": "1", "dim": "None", "depth": "1", "heads": "1", "dropout": "0, 1"},
        "",
    ),
    "patch level": edge(
        lambda **k: on_images(encoders.PatchEncoder(**k)),
        encoders.PatchEncoder,
        {
            "image": 32,
            "token": 8,
            "dim": 24,
            "depth": 2,
            "heads": 3,
            "side": 3,
            "mlp_ratio": 4.0,
            "drop_path": 0.1,
            "std": 0.02,
        },
        {
            "image": "1",
            "token": "1",
            "depth": "1",
            "heads": "1",
            "side": "1, None",
            "mlp_ratio": "1, 2.5",
            "drop_path": "0, 1",
            "std": "0, 1, 2.5, None",
        },
        "others",
    ),
    "region level": edge(
        lambda **k: encoders.RegionEncoder(**k).eval()(draw(2, k["inputs"], 4, 4)),
        encoders.RegionEncoder,
        {
            "patches": 4,
            "inputs": 24,
            "dim": 24,
            "depth": 2,
            "heads": 3,
            "side": 3,
            "mlp_ratio": 4.0,
            "drop_path": 0.1,
            "std": 0.02,
        },
        {
            "patches": "1",
            "inputs": "1",
            "depth": "1",
            "heads": "1",
            "side": "1, None",
            "mlp_ratio": "1, 2.5",
            "drop_path": "0, 1",
            "std": "0, 1, 2.5, None",
        },
        "others",
    ),
    "H-ViT": edge(
        lambda **k: build_hvit(**k)(draw(2, 3, 16, 48)),
        build_hvit,
        {
            "size": "pocket",
            "variant": "local",
            "head": "regression",
            "patches": 4,
            "classes": 6,
            "levels": ("region", "slide"),
        },
        {"levels": "more, less"},
        "slide",
    ),
    "MetaSegNet": edge(
        land,
        metasegnet.MetaSegNet,
        {"classes": 3, "width": 32, "heads": 4, "window": 2, "fusion_stages": (1, 2, 3, 4), "fusion_heads": 2},
        {"classes": "1", "heads": "1", "fusion_stages": "empty, more, less", "fusion_heads": "1, None"},
        "encoder text",
    ),
    "words": edge(
        words,
        metasegnet.Words,
        {"vocabulary": ["wet", "forest"], "width": 16, "length": 4, "layers": 1},
        {"vocabulary": "twice, spaced, blank, row less", "length": "1", "layers": "0, 1"},
        "",
    ),
    "ECAMP": edge(
        chest,
        ecamp.ECAMP,
        {"image": 32, "patch": 8, "window": 2},
        {"patch": "1", "window": "1, None"},
        "encoder decoder text",
    ),
    "ECAMP's blocks": edge(
        lambda **k: chest(encoder=pretraining.Blocks(**k)),
        pretraining.Blocks,
        {"width": 48, "depth": 2, "heads": 3},
        {"depth": "1", "heads": "1"},
        "",
    ),
    "ECAMP's text": edge(
        lambda **k: chest(text=pretraining.Bert(**{"width": 24} | k)),
        pretraining.Bert,
        {"words": 30, "length": 8, "depth": 1, "heads": 2, "hidden": 32, "dropout": 0.1, "pooler": False},
        {"words": "1", "length": "1", "depth": "1", "heads": "1", "hidden": "1", "dropout": "0, 1"},
        "width",
    ),
    "classifier": edge(
        lambda **k: on_images(ecamp.classifier(vit(), **k)),
        heads.classifier,
        {"classes": 3, "probe": False, "drop_path": 0.1},
        {"classes": "1", "drop_path": "0, 1"},
        "encoder",
    ),
    "segmenter": edge(
        lambda **k: on_images(ecamp.Segmenter(vit(), **k)),
        ecamp.Segmenter,
        {"outputs": 1, "channels": (16, 8), "frozen": True, "classes": 1},
        {"outputs": "1", "channels": "nothing, more, less", "classes": "1"},
        "encoder",
    ),
    "detector": edge(
        lambda **k: on_images(ecamp.Detector(vit(), **k)),
        ecamp.Detector,
        {"classes": 1, "expansion": 8, "channels": (64, 48, 32)},
        {"classes": "1", "expansion": "1"},
        "encoder",
    ),
    "MAE": edge(
        lambda **k: on_images(mae.MAE(copy.deepcopy(vit()), **k)),
        mae.MAE,
        {"decoder": (32, 1, 2), "mask_ratio": 0.75, "normalise": True, "xavier": True},
        {},
        "encoder",
    ),
    "PromptPAR": edge(
        people,
        promptpar.Settings,
        {
            "prompts": 5,
            "regions": 4,
            "depth": 2,
            "overlap": 2,
            "masked": True,
            "text_prompts": 3,
            "mm_layers": 1,
            "drop_path": 0.1,
            "threshold": 0.5,
            "official_quirks": False,
        },
        {
            "prompts": "0, 1",
            "regions": "0, 1",
            "depth": "1, None",
            "overlap": "0, 1",
            "text_prompts": "0, 1",
            "mm_layers": "0, 1",
            "drop_path": "0, 1",
            "threshold": "0, 1",
        },
        "visual_embed",
    ),
    "recogniser": edge(
        recogniser,
        sic_cads.Settings,
        {
            "indices": (2, 3, 4),
            "width": 16,
            "levels": 1,
            "lambda_base": 0.8,
            "lambda_novel": 0.8,
            "tau": 50.0,
            "distill": 0.01,
            "freeze_norms": True,
        },
        {
            "indices": "less, first 0",
            "width": "1",
            "levels": "1",
            "lambda_base": "0, 1",
            "lambda_novel": "0, 1",
            "tau": "0, 1, 2.5",
            "distill": "0, 1, 2.5",
        },
        "image_input teacher_input",
    ),
    "DINO's head": edge(
        lambda dim, **k: dino.Head(dim, **k)(draw(2, dim)),
        dino.Head,
        {"dim": 8, "outputs": 16, "hidden": 8, "bottleneck": 4, "norm_last_layer": False},
        {"dim": "1", "outputs": "1", "hidden": "1", "bottleneck": "1"},
        "",
    ),
    "DINO's loss": edge(
        lambda outputs, **k: dino.Loss(outputs, **k)(draw(4, outputs), draw(4, outputs), 2),
        dino.Loss,
        {"outputs": 16, "student": 0.1, "teacher": 0.04, "momentum": 0.9},
        {"outputs": "1", "student": "1, 2.5", "teacher": "1, 2.5", "momentum": "0, 1"},
        "",
    ),
    "crops of grids": edge(
        lambda **k: dino.GridViews(**k)(draw(2, 4, k["patches"], k["patches"])),
        dino.GridViews,
        {"patches": 8, "small": 8, "shares": (0.875, 0.375)},
        {"patches": "1", "small": "0, 1", "shares": "first 0"},
        "",
    ),
    "crops of images": edge(
        lambda **k: dino.ImageViews(**k)(images().sigmoid()),
        dino.ImageViews,
        {
            "sizes": (28, 12),
            "scales": ((0.4, 1.0), (0.05, 0.4)),
            "small": 2,
            "colours": 1.0,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
        {"small": "0, 1", "colours": "0, 1, 2.5", "mean": "first 0, first -1, first 2.5", "std": "first 2.5"},
        "",
    ),
}


def numbers(found: Any) -> Tensor:
    """The numbers in outputs, as one vector."""
    if isinstance(found, Tensor):
        return found.detach().float().flatten()
    parts = found.values() if isinstance(found, Mapping) else found
    return torch.cat([numbers(part) for part in parts if part is not None])


@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str) -> None:
    check(EDGES[name], numbers=numbers)


SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 6, "num_classes": 0}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "oblong": {"img_size": (32, 48)},
    "patches of 14": {"img_size": 56, "patch_size": 14},
    "one patch": {"img_size": 8},
    "registers": {"reg_tokens": 4},
    "no [CLS]": {"class_token": False, "global_pool": "avg"},
    "[CLS] without position": {"no_embed_class": True},
    "no positions": {"pos_embed": "none"},
    "no bias": {"qkv_bias": False},
    "no bias after": {"proj_bias": False},
    "norm of q and k": {"qk_norm": True},
    "norm in attention": {"scale_attn_norm": True},
    "norm in MLP": {"scale_mlp_norm": True},
    "LayerScale": {"init_values": 0.5},
    "norm before": {"pre_norm": True},
    "no norm after": {"final_norm": False},
    "norm after pooling": {"global_pool": "token", "fc_norm": True},
    "mean": {"global_pool": "avg"},
    "maximum": {"global_pool": "max"},
    "mean with [CLS]": {"global_pool": "avg", "pool_include_prefix": True},
    "attention pooling": {"global_pool": "map"},
    "SwiGLU": {"mlp_layer": SwiGLUPacked},
    "any size": {"dynamic_img_size": True},
    "norm after blocks": {"block_fn": ResPostBlock, "init_values": 0.5},
    "one block": {"depth": 1},
    "classifier": {"num_classes": 10},
}
KNOWN = signature(VisionTransformer).parameters  # some releases of timm lack one
OTHERS = ("vit_base_patch16_rope_224", "eva02_tiny_patch14_224", "beit_base_patch16_224", "cait_xxs24_224")
OTHERS += ("deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "resnet18")
# models on an encoder, and which tensors of it they read
ON: dict[str, tuple[Callable[[Any], nn.Module], str, str]] = {
    "SA²VP": (lambda v: sa2vp.SA2VP(v, 3), "backbone.", "head."),
    "VPT": (lambda v: baselines.VPT(v, 3), "backbone.", "head."),
    "fine-tuning": (lambda v: classifying.FineTuning(v, 3), "backbone.", ""),
    "MAE": (lambda v: mae.MAE(v, (32, 1, 2)), "encoder.", "head."),
    "classifier": (lambda v: ecamp.classifier(v, 3, drop_path=0.0), "", "attn_pool."),
    "segmenter": (lambda v: ecamp.Segmenter(v, frozen=False), "map.encoder.", "attn_pool."),
    "MetaSegNet": (lambda v: metasegnet.MetaSegNet(v, 3, width=32, heads=4, window=2), "encoder.", ""),
    "patch level": (encoders.PatchEncoder.from_timm, "", ""),
}


def form(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in OTHERS:
        size = {} if name == "resnet18" else {"img_size": 56 if "14" in name or "swin" in name else 64}
        return timm.create_model(name, num_classes=0, **size)
    model = VisionTransformer(**SIZES | FORMS[name])
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("name", [n for n, options in FORMS.items() if options.keys() <= KNOWN.keys()] + [*OTHERS])
def test_an_encoder_is_read_whole_or_refused(name: str) -> None:
    encoder = form(name)
    side = getattr(getattr(encoder, "patch_embed", None), "img_size", None) or (64, 64)
    used = 0
    for kind, (make, prefix, unread) in ON.items():
        try:
            model = make(copy.deepcopy(encoder)).eval().requires_grad_(True)
        except CompanionError:
            continue
        used += 1
        found = model.forward_intermediates(images(3, *side))[1] if kind == "MAE" else model(images(3, *side))
        (numbers_of(found) * draw(1_000_000)[: len(numbers_of(found))]).sum().backward()
        idle = [n for n, p in model.named_parameters() if n.startswith(prefix) and (p.grad is None or not p.grad.any())]
        idle = [n for n in idle if not unread or not n.startswith(prefix + unread)]
        assert not idle or name == "resnet18", f"{kind} does not read {idle}"  # a trained ReLU may be silent
    assert used >= 2


def numbers_of(found: Any) -> Tensor:
    """The outputs that have a gradient, as one vector."""
    if isinstance(found, Tensor):
        return found.flatten() if found.requires_grad else found.new_zeros(0)
    return torch.cat([numbers_of(part) for part in (found.values() if isinstance(found, Mapping) else found)])


# --- what a call leaves behind ----------------------------------------------------------------------------------------


def inputs(name: str, model: Any, batch: int = 2) -> tuple[Any, ...]:
    """What the forward pass of one of `MODELS` takes."""
    (slug,) = (slug for slug, models in of_all("MODELS").items() if name in models)
    of = getattr(hooks(slug), "inputs", None)
    return of(name, model, batch) if of else (draw(batch, 3, 32, 32),)


def called(name: str, model: Any, given: tuple[Any, ...]) -> Any:
    return model.forward_features(*given) if name in ("ECAMP", "DMT's student") else model(*given)


def cast(given: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(part.to(dtype) if isinstance(part, Tensor) else part for part in given)


@pytest.mark.parametrize("name", MODELS)
def test_a_call_changes_nothing(name: str) -> None:
    """Not the next call, not a copy, not the generator, not a training after inference mode."""
    model = trained(name)
    given, state = inputs(name, model), torch.get_rng_state()
    first = numbers(called(name, model, given))
    assert first.isfinite().all() and torch.equal(state, torch.get_rng_state())
    for other in (model, copy.deepcopy(model)):
        torch.testing.assert_close(numbers(called(name, other, given)), first, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(numbers(called(name, model, given)), first, rtol=1e-5, atol=1e-5)
    if any(p.requires_grad for p in model.parameters()):
        numbers_of(called(name, model.train(), given)).sum().backward()


@pytest.mark.parametrize("name", MODELS)
def test_one_image_and_other_precisions(name: str) -> None:
    model = trained(name)
    given = inputs(name, model)
    first = numbers(called(name, model, given))
    assert numbers(called(name, model, inputs(name, model, 1))).isfinite().all()
    # the box is at the highest score, which rounding may exchange
    room = {"rtol": 0.05, "atol": (0.5 if name == "BAT" else 0.05) * first.abs().max().item()}
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(numbers(called(name, model, given)), first, **room)
        found = numbers(called(name, copy.deepcopy(model).to(dtype), cast(given, dtype)))
        torch.testing.assert_close(found, first, **room)


@pytest.mark.parametrize(
    "name", [name for name in MODELS if name not in ("H-ViT", "DMT's classifier", "ECAMP's classifier")]
)
def test_images_of_another_form_are_refused(name: str) -> None:
    model = trained(name)
    if name == "MLR":
        model.forward = model.prepared
    given = inputs(name, model)
    if name == "MLR":
        given = ((given[0] * 50 + 128).clamp(0, 255).to(torch.uint8),)
    for change in (lambda x: x[0], lambda x: x[:0], lambda x: x[:, :1], lambda x: x.int(), lambda x: x.movedim(1, -1)):
        with pytest.raises(BadParameter):
            called(name, model, tuple(change(part) if isinstance(part, Tensor) else part for part in given))


@pytest.mark.parametrize("name", MODELS)
def test_a_plain_state_dict_is_enough(name: str) -> None:
    model, again = trained(name), MODELS[name]().eval()
    again.load_state_dict(model.state_dict())
    given = inputs(name, model)
    assert torch.equal(numbers(called(name, again, given)), numbers(called(name, model, given)))


def others(value: Any) -> list[Any]:
    """Other values of an attribute."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value / 2]
    if isinstance(value, str):
        return ["off" if value == "always" else "always", f"{value} x"]
    return [{1: 0.5}] if isinstance(value, dict) else [1] if value is None else []


@pytest.mark.parametrize("name", MODELS)
def test_a_changed_attribute_that_matters_is_saved_or_refused(name: str, tmp_path: Path) -> None:
    model = trained(name)
    given = inputs(name, model)
    own = {key: others(old) for key, old in vars(model).items() if not key.startswith("_") and key != "training"}
    for key, value in [(key, value) for key, values in own.items() for value in values]:
        changed = copy.deepcopy(model)
        setattr(changed, key, value)
        if (found := draws(name, changed, given)) == draws(name, model, given):
            continue
        try:
            again = companion.load(companion.save(changed, tmp_path / "model"))
        except CompanionError:
            continue
        assert draws(name, again, given) == found, f"{key} = {value!r} is lost"


def draws(name: str, model: Any, given: tuple[Any, ...]) -> list[float] | str:
    """The outputs of a call from one seed, or the kind of its error."""
    torch.manual_seed(0)
    try:
        return numbers(called(name, model, given)).mul(1e4).round().tolist()
    except Exception as error:
        return type(error).__name__
