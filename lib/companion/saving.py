"""Saves, loads, applies and exports a trained model of any paper.

    companion.save(model, "flowers.safetensors", class_names=["rose", "tulip"], transform=data["test"].transform)
    model = companion.load("flowers.safetensors")
    companion.predict(model, "new.jpg")                     # [{"rose": 0.97, "tulip": 0.03}]
    companion.export(model, "flowers.pt2")                  # torch.export.load("flowers.pt2").module()(images)
    companion.export(model, "flowers.onnx")                 # the same as ONNX

The file is in safetensors format: all tensors, including the frozen backbone's, so that neither cache nor network is
needed; and JSON in its header: the model's `config` (see `ops.config`), class names, preprocessing.

A model has a `config`, which its constructor sets, a method `predict(images, names, **options)`, and
`export_inputs(side)`, the shape of each input, or `not_exported`, the reason why there is no program of it.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from . import __version__
from .backbones import compare, input_of
from .errors import BadParameter, CompanionError, CorruptFile, Count, check_choice, check_names, typed
from .io.config import as_json, config_of, rebuild
from .io.files import atomic, atomic_folder
from .training import checkpoints

FORMAT = "1"
TOLERANCE = 1e-4  # of the exported program's outputs, relative to the largest


@typed
def save(model: Any, path: str | Path, *, class_names: Sequence[str] = (), transform: Any = None) -> Path:
    """Write a model's file, under a temporary name first, and return its path; an existing file is replaced.

    Before writing, the model is built from its config and compared: a model that cannot be restored exactly is refused.

    Args:
        model: of any paper, or a baseline of `models.layers`. TIP's pipeline is written to a folder, by diffusers.
        path: ends in .safetensors; for TIP's pipeline a folder.
        class_names: of a classifier, by label, different ones; by default those of a loaded model. The prompts of a
            CLIP are part of the model.
        transform: from an image to the model's input, one of `companion.data`; of a random one the deterministic test
            version is saved. None: that of a loaded model, else the paper's, for the backbone.

    Raises:
        BadParameter: a model, transform, path or class names that cannot be saved, with the reason.
        CannotWrite: the disk is full.
    """
    path = Path(path)
    if hasattr(model, "adaptor") and hasattr(model, "save_pretrained"):  # TIP's pipeline: diffusers is an extra
        if path.exists():
            _tip().check_parts(path)
        with atomic_folder(path) as new:
            model.save_pretrained(new)
        return path
    if path.suffix != ".safetensors":
        raise BadParameter("path", str(path), "a file name that ends in .safetensors")
    class_names = class_names or getattr(model, "class_names", ())
    transform = transform or getattr(model, "transform", None)
    config, preprocessing = config_of(model), config_of(transform)
    if config is None or not isinstance(model, nn.Module) or "args" not in config:
        accepted = "a model of companion.models, or one that backbones.build made"
        raise BadParameter("model", type(model).__name__, accepted)
    if transform is not None and preprocessing is None:
        accepted = "a transform of companion.data, such as classification.resize_transform(input)"
        raise BadParameter("transform", type(transform).__name__, accepted)
    if preprocessing is not None and "train" in preprocessing["args"]:  # a copy: the transform stays as it is
        preprocessing = preprocessing | {"args": preprocessing["args"] | {"train": False}}
    outputs = config["args"].get("classes", getattr(model, "classes", None))
    check_names(class_names, outputs if isinstance(outputs, int) and outputs > 1 else None)
    state, settings = _tensors(model), _settings(model)
    with torch.random.fork_rng(devices=[]):
        again = rebuild(config)
        exchanged = _different(settings, _settings(again)) & config["args"].keys() & settings.keys()
        if exchanged:  # after the model was made
            config = config | {"args": config["args"] | {name: settings[name] for name in exchanged}}
            again = rebuild(config)
    ours, theirs = ({name: x.shape for name, x in tensors.items()} for tensors in (state, _tensors(again)))
    other = _different(ours, theirs) | _different(theirs, ours) | _different(settings, _settings(again))
    if other or repr(again) != repr(model):
        accepted = "one that was not changed after it was made: from its arguments another one would be loaded"
        raise BadParameter("model", f"{type(model).__name__} ({', '.join(sorted(other)[:8])})", accepted)
    about = {"made": config, "class_names": list(class_names), "preprocessing": preprocessing}
    metadata = {"companion": FORMAT, "model": json.dumps(about, ensure_ascii=False)}
    return checkpoints.save(path.parent, path.stem, state, metadata)


@typed
def load(path: str | Path) -> Any:
    """The model of a file of `save`, in eval mode on the CPU, with `class_names` and `transform` as attributes.

    No code from the file is executed. Raises:
        CorruptFile: the file is missing, truncated, or not one that `save` wrote.
        BadParameter: it names a class or an option that this version does not have.
        BadCheckpoint: its tensors do not match the model that it names.
    """
    path = Path(path)
    if path.is_dir():
        return _tip().TIPPipeline.from_pretrained(path, local_files_only=True)
    about = _header(path)
    try:
        with torch.random.fork_rng(devices=[]):
            model = rebuild(about["made"])
        transform, names = rebuild(about["preprocessing"]), tuple(map(str, about["class_names"]))
    except CompanionError:
        raise
    except Exception as error:  # a constructor with arguments of a wrong type may raise any error
        how = (
            "its header is damaged, or another version of the companion wrote it: load it there, and take its tensors "
        )
        how += "by `state_dict` or, under the authors' names, `to_official`"
        raise CorruptFile(path, f"{how} ({type(error).__name__}: {error})") from error
    if not isinstance(model, nn.Module):
        raise CorruptFile(path, "it names no model")
    state, own = load_file(path), _tensors(model)
    compare(own, state, f"the model that {path} names")
    for name, parameter in model.named_parameters():
        parameter.data = state[name]
    for name, _ in list(model.named_buffers()):
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = state[name]
    vars(model).update(class_names=names, transform=transform)  # not by nn.Module: a transform is no submodule
    return model.eval()


@typed
def predict(
    model: Any,
    images: Path | Image.Image | Iterable[Any],
    *,
    class_names: Sequence[str] = (),
    transform: Callable | None = None,
    **options: Any,
) -> Any:
    """Predictions for images by the model's method `predict`: a list with one entry per image.

        SA²VP, DPLQ, their baselines, DMT's classifier     {class: probability}, the most probable first
        PromptPAR                                          {attribute: probability}
        ECAMP's classifier                                 {finding: probability}; with `exclusive` they sum to 1
        ECAMP's segmenter, detector                        probabilities (outputs, S, S); boxes (n, 7), see `suppress`
        ECAMP, DMT's student                               features (D,)
        MetaSegNet                                         the class of each pixel, (H, W) uint8, 255 without data
        SIC-CADS' recogniser                               {class: score}; with a `detector`, refined detections
        H-ViT                                              the grade of a slide, by name if names are known
        BAT, its baselines                                 for a pair of videos: `bat.tracking.Track`, boxes and scores
        TIP's pipeline                                     the restored image, a PIL image

    The model is set to eval mode and runs on its device.

    Args:
        model: of any paper, trained here or loaded.
        images: paths or PIL images, or one of them. For X-rays DICOM too. For H-ViT: files of `companion slides`, or
            tensors (M, ...) of a slide's regions, as in `HViT.forward`. For BAT: two folders or two video files, RGB
            and the second stream.
        class_names, transform: as in `save`. By default those saved with a loaded model; else class numbers, and the
            paper's transform for the backbone.
        options: for MetaSegNet `texts`, one for each image or one for all, and `tile`, `overlap`; for SIC-CADS
            `detector`, `gamma` and others of `sic_cads.refined`; for ECAMP `exclusive`; for BAT `box`, x, y,
            w, h in the first frame, and others of `bat.tracking.track`, such as `video`, a file to write; for TIP
            `prompt`, `restoration` and others of the pipeline.

    Raises:
        BadParameter: no image; a model, option or number of names that does not match.
        CorruptFile: an image that is missing or cannot be read.
    """
    kind, method = type(model).__name__, getattr(model, "predict", None)
    if method is None:
        raise BadParameter("model", kind, "a model of companion.models")
    given = [images] if isinstance(images, (str, Path, Image.Image, Tensor)) else list(images)
    if not given:
        raise BadParameter("images", "an empty list", "at least one image")
    check_names(class_names)
    names, signature = tuple(class_names or getattr(model, "class_names", ())), inspect.signature(method)
    if "transform" in signature.parameters:
        options["transform"] = transform or getattr(model, "transform", None)
    elif transform is not None:
        raise BadParameter("transform", type(transform).__name__, f"None: {kind} has its own")
    try:
        signature.bind(given, names, **options)
    except TypeError as error:
        raise BadParameter("options", sorted(options), f"those of {kind} ({error})") from error
    if isinstance(model, nn.Module):
        model.eval()
    with torch.no_grad():  # not inference mode: tensors that a model caches in it could not be used in training
        return method(given, names, **options)


@typed
def export(model: Any, path: str | Path, *, text: str | None = None, size: Count = 512) -> Path:
    """Export a model as a program that runs without this package: torch.export, or ONNX (the extra `[export]`).

    The batch is dynamic, height and width are fixed. Inputs are images after the model's transform, outputs logits
    (B, classes); for PromptPAR (B, attributes), for MetaSegNet and ECAMP's segmenter (B, classes, H, W); for ECAMP's
    detector three heads; for BAT score, size, offset and box. The program's outputs are compared with the model's.

    Args:
        path: ends in .pt2 or .onnx; it is returned.
        text: for MetaSegNet: the text of one climate zone, which becomes part of the program.
        size: side of MetaSegNet's images; the other models have one size.

    Raises:
        BadParameter: a model that cannot be exported, with the reason; or another `path`.
        CompanionError: the package onnxscript is not installed; or the program's outputs differ from the model's.
    """
    path, kind = Path(path), type(model).__name__
    check_choice("path", path.suffix, (".pt2", ".onnx"))
    if path.suffix == ".onnx" and importlib.util.find_spec("onnxscript") is None:
        raise CompanionError("ONNX needs onnxscript, which is not installed: pip install -e '.[export]'")
    reason = getattr(model, "not_exported", None)
    if reason or not isinstance(model, nn.Module):
        accepted = f"one that is a single pass of fixed size; {reason or 'a model of companion.models'}"
        raise BadParameter("model", kind, accepted)
    if text is not None:
        if not hasattr(model, "with_text"):
            raise BadParameter("text", text, "None: only MetaSegNet reads one")
        model = model.with_text(text)
    network, shapes = Program(copy.deepcopy(model)).eval(), export_inputs(model, size)
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(0)
    three = [torch.randn(3, *shape, generator=generator).to(device) for shape in shapes.values()]
    given = tuple(x[:2] for x in three)  # a batch of 1 would be specialised to a constant
    batch = {0: torch.export.Dim("batch", min=1, max=1024)}
    with torch.no_grad():
        expected = network(*three)
        try:
            # strict mode keeps `len(images)` symbolic
            program = torch.export.export(network, given, dynamic_shapes=((batch,) * len(given),), strict=True)
        except Exception as error:  # torch raises many kinds of errors
            reason = str(error).strip().partition("\n")[0]
            raise BadParameter("model", kind, f"one that torch.export follows: {reason}") from error
        both = (found if isinstance(found, tuple) else (found,) for found in (program.module()(*three), expected))
        for ours, theirs in zip(*both, strict=True):
            if not torch.allclose(ours, theirs, atol=TOLERANCE * float(theirs.abs().max())):
                difference = float((ours - theirs).abs().max())
                raise CompanionError(
                    f"{path} is not written: the exported {kind} differs from the model by {difference:g}"
                )
    with atomic(path) as temporary:
        if path.suffix == ".pt2":
            torch.export.save(program, temporary)
        else:
            torch.onnx.export(program, input_names=list(shapes), f=str(temporary), external_data=False)
    return path


def export_inputs(model: nn.Module, side: int) -> dict[str, tuple[int, ...]]:
    """The shape of each input of a model, without the batch; of an encoder of another package its images."""
    if own := getattr(model, "export_inputs", None):
        return own(side)
    embed = getattr(model, "patch_embed", None)
    size = embed.img_size if embed is not None else (input_of(model).size,) * 2
    return {"images": (3, *size)}


class Program(nn.Module):
    """A model that returns what is exported: its prediction, a tensor; of BAT and ECAMP's detector a tuple of all."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = self.model(*inputs)
        if isinstance(found, list) or getattr(self.model, "all_outputs", False):
            return tuple(found)
        return found[0] if isinstance(found, tuple) else found


@typed
def push_to_hub(path: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload a saved model to the hub and return its address; the repository is created if it does not exist.

    `load(hf_hub_download(repository, "<the file's name>"))` reads it back. Uses the account of `hf auth login`.

    Args:
        path: of `save`.
        repository: "<user>/<name>".

    Raises `CorruptFile`: the file was not written by `save`. Errors of the hub are raised by its client.
    """
    path, hub = Path(path), HfApi()
    (_tip().check_parts if path.is_dir() else _header)(path)
    address = hub.create_repo(repository, private=private, exist_ok=True)
    message = f"{path.name}, saved by companion {__version__}"
    if path.is_dir():
        hub.upload_folder(repo_id=repository, folder_path=path, commit_message=message)
    else:
        hub.upload_file(repo_id=repository, path_or_fileobj=path, path_in_repo=path.name, commit_message=message)
    return str(address)


def _header(path: Path) -> dict[str, Any]:
    """The JSON header of a model's file. Raises `CorruptFile`."""
    if not path.is_file():
        raise CorruptFile(path, "there is no such file")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CorruptFile(path, f"not a safetensors file ({error})") from error
    if "companion" not in header:
        accepted = "companion.save did not write it; weights alone are read by backbones.build(name, file), or by a "
        raise CorruptFile(path, f"{accepted}model's from_official(backbones.read_state(file))")
    if header["companion"] != FORMAT:
        raise CorruptFile(path, f"its format is {header['companion']}, this version of the companion reads {FORMAT}")
    try:
        about = json.loads(header["model"])
    except (KeyError, ValueError, RecursionError) as error:
        raise CorruptFile(path, f"its header is damaged ({type(error).__name__}: {error})") from error
    if not isinstance(about, dict) or not {"made", "class_names", "preprocessing"} <= about.keys():
        raise CorruptFile(path, "its header is damaged: it has not the entries made, class_names and preprocessing")
    return about


def _settings(model: nn.Module) -> dict[str, Any]:
    """All plain attributes by name, as JSON: of those that are neither plain nor have a config, the type."""
    left_out = {"training", "config", "class_names", "transform", "pretrained_cfg", "default_cfg", "grad_checkpointing"}
    return {
        f"{name}.{key}".removeprefix("."): as_json(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if not key.startswith("_") and key not in left_out
    }


def _different(ours: dict[str, Any], theirs: dict[str, Any]) -> set[str]:
    """The names of `theirs` under which `ours` has something else; others of `ours` are derived, such as caches."""
    return {name for name, value in theirs.items() if ours.get(name) != value}


def _tip() -> Any:
    from .models.tip import pipeline  # imported here: diffusers is an extra, and takes seconds

    return pipeline


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All tensors by name: parameters and buffers, including non-persistent buffers."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
