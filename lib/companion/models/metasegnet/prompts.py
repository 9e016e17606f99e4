"""MetaSegNet's prompts: a text for each climate zone, those of each method, and items with the ids of their text.

    prompts = Prompts.read()                        the included texts, or those of your own file
    prompts.texts(["Cfb", "Aw"])                    one text for each image, by its zone

The climate zone as metadata is the paper's idea; its texts are not known (section 3.4), and these are ours.
`data.climate` finds the zone of a location.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.utils.data import Dataset

from ...backbones import read_bert
from ...data.climate import OCEAN
from ...errors import BadParameter, CorruptFile, MissingWeights, check_choice, extra
from ...io.papers import paper
from .text import BertText, TextEncoder, Words

PROMPTS = Path(__file__).with_name("climate_prompts.yaml")
PLAIN = ("full", "name", "code", "constant", "empty")
EXCHANGED = ("wrong", "shuffled")
_HEADER = "climate zone "
LEVELS = {
    "MetaSegNet": "full",
    "unimodal": None,
    "constant text": "constant",
    "zone names": "name",
    "one-hot zone": "code",
}
"""Of each method the level of its texts in training; None: no text."""


@dataclass(frozen=True)
class Prompts:
    """The texts of the zones.

    `zones`: code -> (name, text); `constant` and `unknown`: see the file. `read` makes one from a file.
    """

    zones: dict[str, tuple[str, str]]
    constant: str
    unknown: str

    @classmethod
    def read(cls, path: str | Path = PROMPTS) -> Prompts:
        """The texts of a YAML file of the form of the included one; a file may have fewer zones, or more.

        Raises `CorruptFile` for a file that cannot be read, or with an entry missing, which it names."""
        try:
            raw = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
            zones = {str(code): (entry["name"], entry["text"]) for code, entry in raw["zones"].items()}
            texts = [raw["constant"], raw["unknown"], *(text for entry in zones.values() for text in entry)]
            if not zones or not all(isinstance(text, str) for text in texts):
                raise TypeError("no zone, or an entry that is not a text")
        except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
            needed = "needed are texts: constant, unknown, and zones with name and text"
            raise CorruptFile(path, f"{type(error).__name__}: {error}; {needed}") from error
        return cls(zones, raw["constant"], raw["unknown"])

    def text(self, zone: str | None, level: str = "full") -> str:
        """The text of one zone; of None, an unknown location, `unknown` (of the level "code" the word "unknown").

        Levels: "full" code, name and description; "name" code and name; "code" the code; "constant" the same text for
        every zone; "empty" no word. Raises `BadParameter` for a zone without a text that is read.
        """
        check_choice("level", level, PLAIN)
        if level == "code":
            return zone or "unknown"
        if level in ("constant", "empty"):
            return self.constant if level == "constant" else ""
        if zone is None:
            return self.unknown
        check_choice("zone", zone, self.zones)
        name, description = self.zones[zone]
        head = f"{_HEADER}{zone}, {name}"
        return f"{head}. {description}" if level == "full" else head

    def texts(self, zones: Sequence[str | None], level: str = "full") -> list[str]:
        """One text for each image's zone, of a level of `text`."""
        return [self.text(zone, level) for zone in zones]

    def exchanged(self, zones: Sequence[str | None], kind: str, seed: int = 0) -> list[str | None]:
        """The zones of images, exchanged as a control; None stays None.

        Args:
            kind: "shuffled": in random order, so that some remain right. "wrong": for all images of a zone another one
                of `zones`; where there is only one zone, another one that has a text.

        Raises `BadParameter`: another kind, or no other zone has a text.
        """
        generator = np.random.default_rng(seed)
        check_choice("kind", kind, EXCHANGED)
        known = [zone for zone in zones if zone is not None]
        if kind == "shuffled":
            shuffled = iter([known[i] for i in generator.permutation(len(known))])
            return [zone and next(shuffled) for zone in zones]
        located = sorted(set(known))
        if len(located) == 1:
            others = sorted(set(self.zones) - {*located, OCEAN})
            if not others:
                raise BadParameter("kind", kind, f"texts of another zone than {located[0]}")
            following = {located[0]: others[generator.integers(len(others))]}
        else:
            order = generator.permutation(len(located))  # each zone gets the next in a ring
            following = {located[a]: located[b] for a, b in zip(order, np.roll(order, -1), strict=True)}
        return [following[zone] if zone is not None else None for zone in zones]

    def of_method(
        self,
        method: str,
        zones: Sequence[str | None],
        kind: str = "",
        own: Sequence[str | None] | None = None,
        seed: int = 0,
    ) -> list[str] | None:
        """A text for each zone, of the method's training or of another `kind`; None for the unimodal network.

        Args:
            kind: a level of `text`; "wrong" and "shuffled": texts of the method's level for exchanged zones.
            own: texts that replace the full text of the right zone.
        """
        level = LEVELS[method]
        if level is None:
            return None
        if kind in EXCHANGED:
            zones, own = self.exchanged(zones, kind, seed), None
        elif kind:
            level = kind
        right = self.texts(zones, level)
        if own is None or level != "full":
            return right
        return [mine or text for mine, text in zip(own, right, strict=True)]


def headless(text: str, unknown: str = "unknown") -> str:
    """A text of `Prompts` with every word of the zone's code and name replaced by `unknown`.

    "climate zone Cfa, humid subtropical. bare soil ..." -> "climate zone unknown, unknown unknown. bare soil ...".
    Half of the training images have such a text (header dropout, section 14), so that the description has to be used.
    Texts with another beginning are not changed.

    Args:
        unknown: a word outside the encoder's vocabulary; for BERT its "[UNK]".
    """
    head, point, description = text.partition(".")
    if not head.lower().startswith(_HEADER):
        return text
    hidden = re.sub(r"[\w-]+", lambda _: unknown, head[len(_HEADER) :])
    return head[: len(_HEADER)] + hidden + point + description


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
        return BertText(*read_bert(folder))
    if not random:
        ways = [f"put the files of the hub's google-bert/bert-base-uncased into {folder}"]
        raise MissingWeights(weights["what"], folder, ways)
    with extra("landcover"):
        import transformers as hf  # imported here because it takes seconds

    print(f"BERT is not in {folder}; a random one in this dry run")
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))}
    return BertText(hf.BertModel(hf.BertConfig()), hf.BertTokenizer(vocab=vocabulary))


class Prompted(Dataset):
    """Items of `data`, (image, labels), with the ids (L,) of their text appended.

    With probability `dropped` the text is without its header. Each text is tokenised once.
    """

    def __init__(self, data: Dataset, encoder: TextEncoder, texts: Sequence[str], dropped: float = 0.0):
        self.data, self.dropped = data, dropped
        unique, self.rows = np.unique(texts, return_inverse=True)
        self.ids = encoder.ids(unique.tolist())
        self.hidden = encoder.ids([headless(text, encoder.unknown) for text in unique.tolist()])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        ids = self.hidden if self.dropped and torch.rand(()) < self.dropped else self.ids
        return *self.data[index], ids[self.rows[index]]
