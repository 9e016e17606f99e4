"""Saves a trained model as one file, loads it, and uploads it to the hub.

    companion.save(model, "flowers.safetensors", class_names=["rose", "tulip"], transform=data["test"].transform)
    model = companion.load("flowers.safetensors")
    companion.predict(model, "new.jpg")                     # [{"rose": 0.97, "tulip": 0.03}]

The file is in safetensors format: all tensors, including the frozen backbone's, so that neither cache nor network is
needed; and JSON in its header: the paper, the record that rebuilds the model (class, options, backbone), class names,
preprocessing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from . import __version__
from .errors import BadCheckpoint, BadParameter, CompanionError, CorruptFile, check_names
from .ops.files import atomic_folder, read_json
from .ops.recorded import made_by, make
from .training import checkpoints

FORMAT = "1"


def save(model: Any, path: str | Path, *, class_names: Sequence[str] = (), transform: Any = None) -> Path:
    """Write a model's file, under a temporary name first, and return its path; an existing file is replaced.

    Before writing, the model is rebuilt from its record and compared: a model that cannot be restored exactly is
    refused.

    Args:
        model: of any paper, or a baseline of `models.layers`. TIP's pipeline is written to a folder, by diffusers.
        path: ends in .safetensors; for TIP's pipeline a folder.
        class_names: of a classifier, by label, different ones. The prompts of a CLIP are part of the model.
        transform: from an image to the model's input, one of `companion.data`; of a random one the deterministic test
            version is saved. None: the paper's, for the backbone.

    Raises:
        BadParameter: a model, transform, path or class names that cannot be saved, with the reason.
        CannotWrite: the disk is full.
    """
    path = Path(path)
    if hasattr(model, "adaptor") and hasattr(model, "save_pretrained"):  # TIP's pipeline: diffusers is an extra
        if path.exists():
            _pipeline(path)
        with atomic_folder(path) as new:
            model.save_pretrained(new)
        return path
    if path.suffix != ".safetensors":
        raise BadParameter("path", str(path), "a file name that ends in .safetensors")
    note = made_by(model)
    if not isinstance(model, nn.Module) or not isinstance(note, dict) or "args" not in note:
        accepted = "a model of companion.models, or one that backbones.build made"
        raise BadParameter("model", type(model).__name__, accepted)
    preprocessing = made_by(transform)
    if preprocessing is not None and "by" not in preprocessing:
        accepted = "a transform of companion.data, such as classification.resize_transform(input)"
        raise BadParameter("transform", type(transform).__name__, accepted)
    if preprocessing is not None and "train" in preprocessing["args"]:  # a copy: the transform stays as it is
        preprocessing = preprocessing | {"args": preprocessing["args"] | {"train": False}}
    check_names(class_names, _outputs(model, note))
    with torch.random.fork_rng(devices=[]):
        again = make(note)
    state = _tensors(model)
    expected = {name: tuple(value.shape) for name, value in _tensors(again).items()}
    if repr(again) != repr(model) or expected != {name: tuple(value.shape) for name, value in state.items()}:
        accepted = "one that was not changed after it was made: from its arguments another one would be loaded"
        raise BadParameter("model", type(model).__name__, accepted)
    about = {"paper": _paper(note), "made": note, "class_names": list(class_names), "preprocessing": preprocessing}
    metadata = {"companion": FORMAT, "model": json.dumps(about, ensure_ascii=False)}
    return checkpoints.save(path.parent, path.stem, state, metadata)


def load(path: str | Path) -> Any:
    """The model of a file of `save`, in eval mode on the CPU, with `class_names` and `transform` as attributes.

    No code from the file is executed. Raises:
        CorruptFile: the file is missing, truncated, or not one that `save` wrote.
        BadParameter: it names a class or an option that this version does not have.
        BadCheckpoint: its tensors do not match the model that it names.
    """
    path = Path(path)
    if path.is_dir():
        from .models.tip.pipeline import TIPPipeline  # imported here: diffusers is an extra, and takes seconds

        return TIPPipeline.from_pretrained(_pipeline(path), local_files_only=True, use_safetensors=True)
    about = _header(path)
    try:
        with torch.random.fork_rng(devices=[]):
            model = make(about["made"])
        transform, names = make(about["preprocessing"]), tuple(map(str, about["class_names"]))
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
    shapes = [
        f"{name} {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if own.keys() != state.keys() or shapes:
        raise BadCheckpoint(
            f"the model that {path} names", own.keys() - state.keys(), state.keys() - own.keys(), shapes
        )
    for name, parameter in model.named_parameters():
        parameter.data = state[name]
    for name, _ in list(model.named_buffers()):
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = state[name]
    vars(model).update(class_names=names, transform=transform)  # not by nn.Module: a transform is no submodule
    return model.eval()


def push_to_hub(path: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload a saved model to the hub and return its address; the repository is created if it does not exist.

    `load(hf_hub_download(repository, "<the file's name>"))` reads it back. Uses the account of `hf auth login`.

    Args:
        path: of `save`.
        repository: "<user>/<name>".

    Raises `CorruptFile`: the file was not written by `save`. Errors of the hub are raised by its client.
    """
    path, hub = Path(path), HfApi()
    files = [f for f in _pipeline(path).rglob("*") if f.is_file()] if path.is_dir() else [path]
    if files == [path]:
        _header(path)
    address = hub.create_repo(repository, private=private, exist_ok=True)
    root = path if path.is_dir() else path.parent
    added = [CommitOperationAdd(file.relative_to(root).as_posix(), file) for file in files]
    hub.create_commit(repository, added, commit_message=f"{path.name}, saved by companion {__version__}")
    return str(address)


def _outputs(model: nn.Module, note: dict[str, Any]) -> int | None:
    """How many class names a model has; None where that is not known or it has a single output."""
    count = note["args"].get("classes", getattr(getattr(model, "slide", None), "classes", None))
    if isinstance(text := note["args"].get("text"), dict) and "tensor" in text:  # an embedding of each class
        count = text["tensor"][0]
    return count if isinstance(count, int) and count > 1 else None


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


def _pipeline(folder: Path) -> Path:
    """The folder of a TIP pipeline. Raises `CorruptFile` when it is another pipeline's."""
    index = folder / "model_index.json"
    found = read_json(index)
    if not isinstance(found, dict) or found.get("_class_name") != "TIPPipeline":
        raise CorruptFile(index, "not of a TIPPipeline")
    return folder


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All tensors by name: parameters and buffers, including non-persistent buffers."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _paper(note: Mapping[str, Any]) -> str:
    """The paper of a recorded model; empty for a baseline that several share."""
    package, name = str(note.get("by")).split(".")[:2], str(note.get("by")).split(".")[2:3]
    return name[0] if package == ["companion", "models"] and name != ["layers"] else ""
