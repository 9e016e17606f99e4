"""The networks of the `paper` profile: text encoder, texts and weights of each method.

The text encoder is a RECONSTRUCTION. Neither the paper's weights nor its texts were released.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ... import backbones
from ...errors import MissingWeights
from ...io.papers import paper
from ...training.checkpoints import trained_state
from ..layers.state_dicts import load_official
from . import official
from .climate import EXCHANGED, Prompts
from .model import SIZES, MetaSegNet, swin
from .text import BertText, TextEncoder, Words

SWIN = "swin_base_patch4_window7_224.ms_in22k_ft_in1k"
LEVELS = {
    "MetaSegNet": "full",
    "unimodal": None,
    "constant text": "constant",
    "zone names": "name",
    "one-hot zone": "code",
}
"""Of each method the level of its texts in training; None: no text."""


def texts(
    prompts: Prompts,
    method: str,
    zones: Sequence[str | None],
    kind: str = "",
    own: Sequence[str | None] | None = None,
    seed: int = 0,
) -> list[str] | None:
    """A text for each zone, of the method's training or of another `kind`; None for the unimodal network.

    Args:
        kind: a level of `Prompts.text`; "wrong" and "shuffled": texts of the method's level for exchanged zones.
        own: texts that replace the full text of the right zone.
    """
    level = LEVELS[method]
    if level is None:
        return None
    if kind in EXCHANGED:
        zones, own = prompts.exchanged(zones, kind, seed), None
    elif kind:
        level = kind
    if level == "code":
        return [zone or "unknown" for zone in zones]
    right = prompts.texts(zones, level)
    return right if own is None or level != "full" else [mine or text for mine, text in zip(own, right, strict=True)]


def text_encoder(
    method: str, prompts: Prompts, data_root: str | Path = "data", *, random: bool = False
) -> TextEncoder | None:
    """The text encoder of a method: BERT-base, frozen; for "one-hot zone" a trained vector for each zone; None for the
    unimodal network.

    Args:
        random: where BERT is not there it is random, for a dry run, and knows no word.

    Raises `MissingWeights`: BERT's folder is not below `<data_root>/weights`."""
    level = LEVELS[method]
    if level is None:
        return None
    if level == "code":
        return Words.of(list(prompts.zones), layers=0, length=1)
    weights = next(w for w in paper("metasegnet")["weights"] if w["name"] == "bert")
    folder = (Path(data_root) / "weights" / weights["file"]).parent
    if folder.joinpath("config.json").is_file():
        return BertText(*backbones.read_bert(folder))
    if not random:
        ways = [f"put the files of the hub's google-bert/bert-base-uncased into {folder}"]
        raise MissingWeights(weights["what"], folder, ways)
    import transformers as hf  # imported here because it takes seconds

    print(f"BERT is not in {folder}; a random one in this dry run")
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))}
    return BertText(hf.BertModel(hf.BertConfig()), hf.BertTokenizer(vocab=vocabulary))


def network(
    method: str,
    prompts: Prompts,
    classes: int,
    *,
    data_root: str | Path = "data",
    weights: str = "",
    checkpoint: str = "",
    seed: int = 0,
    random: bool = False,
) -> MetaSegNet:
    """The network of a method: on the Swin-B of `weights`, or all of it from `checkpoint`.

    Args:
        weights: empty for timm's released Swin-B from the cache, or a file of it, or the author's `stseg_*.pth`.
        checkpoint: weights that a training saved, or of GeoSeg's FT-UNetFormer for the unimodal network.
        random: weights that are not there are random, for a dry run.

    Raises `MissingWeights`, `CorruptFile`, `BadCheckpoint`: with the change or download needed.
    """
    torch.manual_seed(seed)
    words, encoder = text_encoder(method, prompts, data_root, random=random), swin(**SIZES["paper"]["swin"])
    model = MetaSegNet(encoder, classes, words, **SIZES["paper"]["model"])
    if checkpoint:
        load(model, checkpoint)
    elif weights or not random or backbones.or_random(SWIN, "pretrained") == "pretrained":
        load_swin(model, weights)
    return model.eval()


def load_swin(model: MetaSegNet, weights: str = "") -> None:
    """Load an image encoder: timm's released Swin-B (empty), a file of it, or the author's, which has the norms too."""
    state = official.cleaned(backbones.read_state(weights)) if weights else {}
    state = {f"backbone.{name.removeprefix('backbone.')}": tensor for name, tensor in state.items()}
    if any(name.startswith("backbone.norm0.") for name in state):
        names = {ours: theirs for ours, theirs in model.official_names().items() if theirs.startswith("backbone.")}
        load_official(model, state, names, "the author's Swin")
    else:
        timms = backbones.build(SWIN, weights or "pretrained").state_dict()
        model.encoder.load_state_dict({name: timms[name] for name in model.encoder.state_dict()})


def load(model: MetaSegNet, path: str | Path) -> None:
    """Load the weights that a training saved; a frozen text encoder is not among them.

    The unimodal network also loads checkpoints of GeoSeg's FT-UNetFormer.

    Raises `MissingWeights`, `CorruptFile`, `BadCheckpoint`."""
    if not Path(path).is_file():
        ways = ["train one (task = 'train', no checkpoint); the paper's was never released"]
        raise MissingWeights("a trained MetaSegNet", path, ways)
    state = backbones.read_state(path)
    if model.text is None and any(name.removeprefix("net.").startswith("backbone.") for name in state):
        names, what = model.official_names(), f"{official.WHAT} of these classes"
        load_official(model, official.cleaned(state), names, what)
    else:
        names = {name: name for name in trained_state(model)}
        load_official(model, state, names, "a MetaSegNet of these classes and texts")
