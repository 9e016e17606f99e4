"""Saves, loads and applies a trained model of any paper.

    model.save_pretrained("flowers", class_names=["rose", "tulip"], transform=data["test"].transform)
    model = companion.load("flowers")                       # or SA2VP.from_pretrained("flowers"), or "<user>/<name>"
    companion.predict(model, "new.jpg")                     # [{"rose": 0.97, "tulip": 0.03}]
    model.push_to_hub("<user>/<name>")                      # the Hugging Face Hub, with the account of `hf auth login`

A model's folder has `model.safetensors`: all tensors, including the frozen backbone's, so that neither cache nor
network is needed; `config.json`: how the model is made (see `io.config`), class names, preprocessing; and `README.md`,
a model card. TIP's pipeline is saved by diffusers.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, snapshot_download
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from .backbones import compare
from .errors import BadParameter, CompanionError, CorruptFile, check_names, typed
from .io import papers
from .io.config import as_json, config_of, rebuild
from .io.files import read_json, write_json
from .training import checkpoints

FORMAT = 2
CONFIG, WEIGHTS = "config.json", "model.safetensors"
LIMITS = """A research model: it has not been tested for any use. Its predictions hold at most for images like those
that it was trained on."""
CARD = """---
{{ card_data }}
---

# {{ kind }}

{{ about }}

```python
import companion

model = companion.load("{{ place }}")
companion.predict(model, "image.jpg")
```

## Data

{{ data }} Which images it was trained on, and under which licence, is not in its files: write it here.

## Limits

{{ limits }}

## Citation

{{ citation }}
"""


class Pretrained(ModelHubMixin):
    """A model with `save_pretrained`, `from_pretrained` and `push_to_hub`, as transformers and diffusers have them."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        class_names: Sequence[str] = (),
        transform: Any = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **hub: Any,
    ) -> str | None:
        """Write the model's folder, see `companion.save`; with `push_to_hub` upload it too, and return the address.

        Args:
            class_names, transform: see `companion.save`.
            repo_id: "<user>/<name>" on the hub; by default the folder's name.
            hub: of `push_to_hub`.
        """
        folder = save(self, save_directory, class_names=class_names, transform=transform)
        return self.push_to_hub(repo_id or folder.name, **hub) if push_to_hub else None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **hub: Any) -> Self:
        """The model of a folder or of "<user>/<name>" on the hub, see `load`.

        Raises `BadParameter`: it holds a model of another class.
        """
        model = load(pretrained_model_name_or_path, **hub)
        if not isinstance(model, cls):
            raise BadParameter("folder", f"a {type(model).__name__}", f"a {cls.__name__}: companion.load reads any")
        return model


@typed
def save(model: Any, folder: str | Path, *, class_names: Sequence[str] = (), transform: Any = None) -> Path:
    """Write a model's folder and return its path; each file under a temporary name first, existing ones are replaced.

    Class names and transform become the model's, as those of a loaded one: `push_to_hub` sends them too.

    Before writing, the model is built from its config and compared: a model that cannot be restored exactly is refused.

    Args:
        model: of any paper, a baseline of `models.layers`, or an encoder of `backbones.build`.
        class_names: of a classifier, by label, different ones; by default those of a loaded model. The prompts of a
            CLIP are part of the model.
        transform: from an image to the model's input, one of `companion.data`; of a random one the deterministic test
            version is saved. None: that of a loaded model, else the paper's, for the backbone.

    Raises:
        BadParameter: a model, transform, path or class names that cannot be saved, with the reason.
        CannotWrite: the disk is full.
    """
    folder = Path(folder)
    if hasattr(model, "adaptor") and hasattr(model, "save_pretrained"):  # TIP's pipeline: diffusers is an extra
        model.save_pretrained(folder)
        return folder
    if folder.is_file() or folder.suffix == ".safetensors":
        raise BadParameter("folder", str(folder), "the name of a folder: the weights are one of its files")
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
    classes = getattr(model, "num_classes", config["args"].get("classes"))
    check_names(class_names, classes if isinstance(classes, int) and classes > 1 else None)
    if isinstance(classes, int) and isinstance(config["args"].get("classes"), int):  # timm's `reset_classifier`
        config = config | {"args": config["args"] | {"classes": classes}}
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
    (folder / CONFIG).unlink(missing_ok=True)  # a kill leaves no config of other weights
    checkpoints.save(folder, Path(WEIGHTS).stem, state)
    about = {"companion": FORMAT, "model": config, "class_names": list(class_names), "preprocessing": preprocessing}
    if not (folder / "README.md").exists():  # which its owner may have written
        card(model, folder, about).save(folder / "README.md")
    write_json(folder / CONFIG, about)
    _named(model, about)
    return folder


def card(model: nn.Module, folder: Path, about: dict[str, Any]) -> ModelCard:
    """The model card: paper, classes, what the companion found and could not find, citation."""
    from .viz.tables import escape  # imported here: it imports pandas

    kind, module = type(model).__name__, type(model).__module__.split(".")
    slug = module[2] if module[:2] == ["companion", "models"] and module[2] in papers.slugs() else ""
    names = ", ".join(map(escape, about["class_names"]))
    found = {"about": "By the companion to vision-transformer papers.", "limits": LIMITS, "citation": "none"}
    found["data"] = f"Classes: {names}." if names else "It has no class names."
    if slug:
        facts = papers.paper(slug)
        title, venue, arxiv = facts["title"], facts["venue"], f"https://arxiv.org/abs/{facts['arxiv']}"
        authors = ", ".join(" ".join(reversed(name.split(", "))) for name in facts["authors"])
        findings = [
            f"- {entry['topic']}: {entry['here']}" for entry in papers.findings(slug) if entry["kind"] == "fault"
        ]
        found |= {
            "about": f"Of [{title}]({arxiv}) ({venue}), by the companion to vision-transformer papers.",
            "limits": "\n".join(
                [
                    LIMITS,
                    "",
                    "What the authors' code does otherwise than the paper says, and what is done here:",
                    "",
                    *findings,
                ]
            ),
            "citation": f"{authors}. {title}. {venue}. {arxiv}",
        }
    data = ModelCardData(library_name="companion", tags=["model_hub_mixin", *([slug] if slug else [])])
    return ModelCard.from_template(data, template_str=CARD, kind=kind, place=folder.name, **found)


@typed
def load(path: str | Path, **hub: Any) -> Any:
    """The model of a folder of `save`, in eval mode on the CPU, with `class_names` and `transform` as attributes.

    No code of the files is executed.

    Args:
        path: the folder; "<user>/<name>" on the Hugging Face Hub where there is no such folder; or a file ending in
            .safetensors that version 0.2 wrote.
        hub: of `huggingface_hub.snapshot_download`, such as `revision`, `token`, `local_files_only`.

    Raises:
        CorruptFile: a file is missing, truncated, or not one that `save` wrote.
        BadParameter: it names a class or an option that this version does not have.
        BadCheckpoint: its tensors do not match the model that it names.
    """
    path = Path(path)
    if path.suffix == ".safetensors" and not path.is_dir():
        about, weights = _header(path), path
    else:
        folder = path if path.exists() else downloaded(str(path), **hub)
        if (folder / "model_index.json").exists():
            return importlib.import_module(".models.tip", __package__).TIPPipeline.from_pretrained(folder)
        about, weights = read_json(folder / CONFIG), folder / WEIGHTS
        if not isinstance(about, dict) or not {"companion", "model", "class_names", "preprocessing"} <= about.keys():
            accepted = (
                "companion.save did not write it; weights alone are read by backbones.build(name, file), or by a "
            )
            raise CorruptFile(folder / CONFIG, f"{accepted}model's from_official(backbones.read_state(file))")
        if about["companion"] != FORMAT:
            other = f"its format is {about['companion']}, this version of the companion reads {FORMAT}"
            raise CorruptFile(folder / CONFIG, other)
    try:
        with torch.random.fork_rng(devices=[]):
            model = rebuild(about["model"])
        if not isinstance(model, nn.Module):
            raise CorruptFile(path, "it names no model")
        _named(model, about)
    except CompanionError:
        raise
    except Exception as error:  # a constructor with arguments of a wrong type may raise any error
        how = (
            "its config is damaged, or another version of the companion wrote it: load it there, and take its tensors "
        )
        how += "by `state_dict` or, under the authors' names, `to_official`"
        raise CorruptFile(path, f"{how} ({type(error).__name__}: {error})") from error
    try:
        state = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise CorruptFile(weights, f"not a safetensors file ({error})") from error
    compare(_tensors(model), state, f"the model that {path} names")
    for name, parameter in model.named_parameters():
        parameter.data = state[name]
    for name, _ in list(model.named_buffers()):
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = state[name]
    return model.eval()


def _named(model: nn.Module, about: dict[str, Any]) -> None:
    """Give a model the class names and the transform of its config."""
    names, transform = tuple(map(str, about["class_names"])), rebuild(about["preprocessing"])
    vars(model).update(class_names=names, transform=transform)  # not by nn.Module: a transform is no submodule


def downloaded(name: str, **hub: Any) -> Path:
    """The folder of a model of the hub, without code. Raises `CorruptFile`: it is no name there, or not found."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CorruptFile(name, "there is no such folder")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt"], **hub))
    except Exception as error:  # of the hub's client, of its HTTP library, or of the network
        reason = str(error).strip().partition("\n")[0]
        raise CorruptFile(name, f"there is no such folder, and the hub gives none of that name: {reason}") from error


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


def _header(path: Path) -> dict[str, Any]:
    """What the file of version 0.2 says of its model. Raises `CorruptFile`."""
    if not path.is_file():
        raise CorruptFile(path, "there is no such file")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CorruptFile(path, f"not a safetensors file ({error})") from error
    if header.get("companion") != "1":
        raise CorruptFile(
            path,
            "companion.save of version 0.2 did not write it; weights alone are read by a model's "
            "from_official(backbones.read_state(file)), or by backbones.build(name, file)",
        )
    try:
        about = json.loads(header["model"])
    except (KeyError, ValueError, RecursionError) as error:
        raise CorruptFile(path, f"its header is damaged ({type(error).__name__}: {error})") from error
    if not isinstance(about, dict) or not {"made", "class_names", "preprocessing"} <= about.keys():
        raise CorruptFile(path, "its header is damaged: it has not the entries made, class_names and preprocessing")
    return about | {"model": about["made"]}


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


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All tensors by name: parameters and buffers, including non-persistent buffers."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
