"""From a name to an encoder: released weights (timm, open_clip), a file, or random.

    build("vit_b16")                         ViT-B/16 as Google released it, from the local cache
    build("vit_b16", "ViT-B_16.npz")         the same from a file
    build("swin_b", download=True)           Swin-B, fetched when it is not cached
    build("openclip:ViT-B-32/openai")        a CLIP; any other name is one of timm's

Nothing is downloaded unless `download=True`.
"""

from __future__ import annotations

import functools
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from safetensors.torch import load_file
from torch import nn

from .errors import BadCheckpoint, BadParameter, CorruptFile, MissingWeights
from .ops import unpickle
from .ops.recorded import recorded

# Our short names, and the exact releases they stand for: `.orig_in21k` is Google's original ViT
# ("vit_base_patch16_224_in21k" now means the later `.augreg_in21k`).
TIMM = {"vit_b16": "vit_base_patch16_224.orig_in21k", "swin_b": "swin_base_patch4_window7_224.ms_in22k"}


@dataclass(frozen=True)
class Input:
    """What a backbone wants to see: (3, size, size) images, `(pixel - mean) / std` per channel for pixels in [0, 1]."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@functools.cache
@torch.inference_mode(False)
def per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """A value for each channel, (channels, 1, 1), sent to a device once."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


@recorded(weights="random", download=False)
def build(name: str, weights: str | Path = "pretrained", *, download: bool = False, **overrides: Any) -> nn.Module:
    """Build an encoder in eval mode.

    Args:
        name: "vit_b16", "swin_b", any timm model, or "openclip:<model>/<tag>".
        weights: "pretrained", "random" (torch's current seed), or a file: safetensors, .pth / .bin (read with
            `weights_only=True`), or the .npz of the original ViT release.
        download: fetch pretrained weights that are not in the cache.
        overrides: passed to the model, for example `drop_path_rate=0.1` or `num_classes=10`. Without `num_classes` a
            timm model has no classifier; with it, one that starts random unless the weights have one of that size.

    Raises:
        BadParameter: unknown name or `weights`.
        MissingWeights: pretrained weights that are not cached, `download` being False or the network out of reach.
        CorruptFile: a file that cannot be read.
        BadCheckpoint: weights that do not fit the model, with the names at fault.
    """
    if name.startswith("openclip:"):
        return _build_openclip(name, weights, download, overrides)
    return _build_timm(name, weights, download, overrides)


def find_weights(name: str, *, download: bool = False) -> Path:
    """The file of a timm model's released weights in the local cache; fetched first when `download` says so.

    Raises:
        BadParameter: timm knows no released weights of that name.
        MissingWeights: not cached, and not to be downloaded or out of reach.
    """
    full = TIMM.get(name, name)
    if not timm.is_model(full) or (cfg := timm.get_pretrained_cfg(full)) is None:
        raise BadParameter("name", name, f"{list(TIMM)} or a timm model with released weights")
    names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    return hub_file(full, cfg.hf_hub_id, names, download)


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """The named tensors of a safetensors or torch.save file, read without running anything that is in it.

    A training checkpoint may hold more: its entry "net", "state_dict" or "model" is taken, and objects of the trainer's
    own classes are passed over. A file that ends in .pkl is a plain pickle, of tensors or arrays, as detectron2 has it.

    Raises `CorruptFile` when it is missing, truncated, or holds something else.
    """
    if Path(path).suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:
            raise CorruptFile(path, f"not a safetensors file ({type(error).__name__}: {error})") from error
    pickled = Path(path).suffix == ".pkl"
    state = unpickle.load(path) if pickled else unpickle.load_torch(path)
    for entry in ("net", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(entry), dict):
            state = state[entry]
            break
    if pickled and isinstance(state, dict):
        state = {n: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for n, v in state.items()}
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CorruptFile(path, "holds something else than named tensors")
    # wrapped by DataParallel when it was saved
    wrapped = bool(state) and all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if wrapped else name: value for name, value in state.items()}


def input_of(model: nn.Module) -> Input:
    """The image size and normalisation that the weights of a model made by `build` were trained with."""
    if hasattr(model, "pretrained_cfg"):
        cfg = model.pretrained_cfg
        # a model built with another img_size says so in its patch embedding only
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or cfg["input_size"][1:]
        return Input(int(size[0]), tuple(cfg["mean"]), tuple(cfg["std"]))
    if hasattr(getattr(model, "visual", None), "preprocess_cfg"):
        cfg, size = model.visual.preprocess_cfg, model.visual.image_size
        return Input(int(size[0] if isinstance(size, tuple) else size), tuple(cfg["mean"]), tuple(cfg["std"]))
    raise BadParameter("model", type(model).__name__, "a model made by backbones.build")


# --- timm -------------------------------------------------------------------------------------------------------------


def _build_timm(name: str, weights: str | Path, download: bool, overrides: dict) -> nn.Module:
    full = TIMM.get(name, name)
    if not timm.is_model(full):
        raise BadParameter("name", name, f"{list(TIMM)}, 'openclip:<model>/<tag>', or a timm model")
    if timm.get_pretrained_cfg(full) is None and weights == "pretrained":
        raise BadParameter("weights", weights, f"'random' or a file: timm knows no released weights of {full}")
    # the path is settled before the model is built: a missing file should not cost seconds and gigabytes first
    path = None
    if weights == "pretrained":
        path = find_weights(full, download=download)
    elif weights != "random":
        path = _file(weights)
    model = timm.create_model(full, pretrained=False, **{"num_classes": 0, **overrides})
    if path is not None:
        load_weights(model, path, full)
    return model.eval()


# --- open_clip --------------------------------------------------------------------------------------------------------


def _build_openclip(name: str, weights: str | Path, download: bool, overrides: dict) -> nn.Module:
    import open_clip  # here and below: it imports transformers, and half of the papers use neither
    from open_clip.model import set_model_preprocess_cfg

    architecture, _, tag = name.removeprefix("openclip:").partition("/")
    if architecture not in open_clip.list_models():
        raise BadParameter("name", name, "'openclip:<model>/<tag>' with a model of open_clip.list_models()")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags and (tag or weights == "pretrained"):
        raise BadParameter("name", name, f"'openclip:{architecture}/' and one of {tags}")
    release = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}

    path = None
    if weights == "pretrained":
        repository, _, file = release["hf_hub"].rpartition("/")
        names = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
        path = hub_file(name, repository, names, download)
    elif weights != "random":
        path = _file(weights)
    # open_clip warns on the root logger about a model without weights; here the file is loaded a few lines below
    logging.disable(logging.WARNING)
    try:
        model = open_clip.create_model(
            architecture,
            pretrained_text=False,  # a text tower must not fetch weights of its own
            force_quick_gelu=bool(release.get("quick_gelu")),
            **overrides,
        )
    finally:
        logging.disable(logging.NOTSET)
    if release:
        set_model_preprocess_cfg(model, {**model.visual.preprocess_cfg, **release})
    if path is not None:
        load_weights(model, path, name)
    return model.eval()


# --- files ------------------------------------------------------------------------------------------------------------


def _file(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise BadParameter("weights", str(path), "'pretrained', 'random' or an existing file")
    return Path(path)


def hub_file(name: str, repository: str | None, files: list[str], download: bool) -> Path:
    """Where the cache holds the first of `files` that it has; downloads it when that was asked for."""
    ways = [
        "on a machine with a network: `companion fetch <paper>`, or backbones.build(..., download=True)"
        + (f", from the hub's repository '{repository}'" if repository else ""),
        "with a file that you have: backbones.build(..., weights='<file>') takes safetensors, .pth, and ViT's .npz",
    ]
    if not repository:
        raise MissingWeights(name, constants.HF_HUB_CACHE, ways[1:])
    for file in files:
        if isinstance(cached := try_to_load_from_cache(repository, file), str):
            return Path(cached)
    if download:
        reason = None
        for file in files:
            try:
                return Path(hf_hub_download(repository, file))
            except Exception as error:  # the hub's client raises many kinds: offline, no such file, gated, no route
                reason = error
        raise MissingWeights(name, constants.HF_HUB_CACHE, ways) from reason
    raise MissingWeights(name, constants.HF_HUB_CACHE, ways)


def load_weights(model: nn.Module, path: Path, name: str) -> None:
    """Load a file into a model, strictly; only a classifier may be missing from either side."""
    if path.suffix == ".npz":
        _load_npz(model, path, name)
        return
    state = read_state(path)
    if hasattr(model, "visual"):
        from open_clip.factory import load_checkpoint

        try:
            load_checkpoint(model, str(path), strict=True)
        except (KeyError, RuntimeError, AttributeError) as error:
            _compare(model.state_dict(), state, name)
            raise BadCheckpoint(f"{name} ({error})") from error
        return
    # timm keeps the renaming of other releases (Swin's own .pth, MAE's, CLIP's) next to each model
    renames = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        state = renames(state, model) if renames else state
    except (KeyError, RuntimeError, ValueError, AttributeError) as error:
        raise BadCheckpoint(f"{name} ({error})") from error
    own = model.state_dict()
    heads = tuple(f"{head}." for head in _classifiers(model))
    state = {
        key: value
        for key, value in state.items()
        if not key.startswith(heads) or (key in own and own[key].shape == value.shape)
    }
    _compare({key: value for key, value in own.items() if key in state or not key.startswith(heads)}, state, name)
    model.load_state_dict(state, strict=False)


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    names = model.pretrained_cfg.get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def _compare(own: dict, state: dict, name: str) -> None:
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
    ]
    if own.keys() != state.keys() or shapes:
        raise BadCheckpoint(name, own.keys() - state.keys(), state.keys() - own.keys(), shapes)


def _load_npz(model: nn.Module, path: Path, name: str) -> None:
    if not hasattr(model, "load_pretrained"):
        raise BadCheckpoint(f"{name}: an .npz is the original ViT release, and this model is not a ViT")
    try:
        with np.load(path, allow_pickle=False) as file:
            for key in file.files:
                file[key]  # decompressed and checked; an array of Python objects is refused
    except Exception as error:
        raise CorruptFile(path, f"not an .npz of plain arrays ({type(error).__name__}: {error})") from error
    try:
        model.load_pretrained(str(path))
    except Exception as error:  # timm's loader indexes, reshapes and copies: any of it may fail on a foreign file
        raise BadCheckpoint(f"{name} ({type(error).__name__}: {error})") from error
