"""Entity-centred context distillation: one plain statement for each entity of a report (section 3.8).

    There is small right pleural effusion. There may be pneumonia. There is no pneumothorax.

Pre-training inserts these sentences into the report (`text.splice`). The authors generated them with a Vicuna; which
one, and its full prompt, was not found. Here any text-generation model of `transformers` can be used, or `Rules`,
offline. Every answer is checked: one of another form, or with words that are not in the report, is regenerated, and
finally refused. Answers are cached in a file, so that a killed run resumes.

    cache = "distilled.sqlite"
    found = distil(reports, Rules(), cache)                                  # or Generator("lmsys/vicuna-7b-v1.5")
    found.statements[0], found.refused                                       # "" where no answer was accepted
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...errors import CannotWrite, CompanionError, CorruptFile, MissingWeights
from ...ops.progress import progress
from .text import ENTITIES

# The beginning is the authors' (truncated in their overview figure); the rest is ours, in the form of their examples.
PROMPT = """\
Please conclude the reports for the given entities. Write one sentence for each entity, in one of these forms and \
nothing else:
There is X.
There may be X.
There is no X.
X is the entity as it is named below, with the words next to it that describe it in the report and no others.

Entities: {entities}
Report: {report}
"""
FORM = re.compile(r"There (is no|may be|is) ([^.]+?)\s*\.\s*", re.IGNORECASE)
TRIES = 3

# phrases that negate or question a finding, before or after its name in the sentence
ABSENT = (
    r"\b(no|not|without|free of|clear of|negative for|absence of|rather than)\b",
    r"\b(absent|resolved|not seen|not present|ruled out)\b",
)
DOUBTFUL = (
    r"\b(may|might|could|possibl[ey]|probabl[ey]|likely|suspected|suspicious|suggest\w*|concern\w*|question\w*|versus)\b",
    r"\b(possible|likely|suspected|questioned|not excluded|cannot be excluded|be considered)\b",
)
# words before an entity that do not describe it: a description ends at them
_PLAIN = """
    a an the of and or in on at to with for is are was were be been has have there this that these those no not without
    may might could possible possibly probable probably likely suspected evidence any seen noted which as from by than
    but however also it its represent represents reflect reflects suggest suggests suggesting indicate indicates
    concerning question versus due consistent compatible
"""
_UNDESCRIBING = frozenset(_PLAIN.split())


class Malformed(CompanionError):
    """An answer that is refused; the message gives the reason."""


class BackEnd(Protocol):
    """A generator of statements; `name` is part of the key of a cached answer."""

    name: str

    def __call__(self, report: str, entities: Sequence[str], attempt: int) -> str: ...


@dataclass(frozen=True)
class Distilled:
    """Statements in the order of the reports, "" where none were accepted, and the reasons of refusal by position."""

    statements: list[str]
    refused: dict[int, str]


def entities_in(report: str, entities: Sequence[str] = ENTITIES) -> list[str]:
    """The entities that a report names, in order, each once. Plurals count: "opacities" names "opacity"."""
    forms = {form: entity for entity in entities for form in _forms(entity)}
    words = re.findall(r"[a-z]+", report.lower())
    return list(dict.fromkeys(forms[word] for word in words if word in forms))


def _forms(entity: str) -> tuple[str, ...]:
    word = entity.lower()
    if word.endswith("y"):
        return (word, word[:-1] + "ies")
    if word.endswith("is"):
        return (word, word[:-2] + "es")
    return (word, word + ("es" if word.endswith(("s", "x")) else "s"))


def check(answer: str, report: str, entities: Sequence[str]) -> str:
    """The answer with single spaces, if it is valid.

    Raises:
        Malformed: text of another form; an entity that is missing or named twice; a sentence without an entity;
            descriptions with words that are not in the report.
    """
    text = " ".join(answer.split())
    if not text:
        raise Malformed("the answer is empty")
    rest = FORM.sub("", text)
    if rest:
        raise Malformed(f"not of the form 'There is X.', 'There may be X.' or 'There is no X.': {rest[:60]!r}")
    known, found = set(re.findall(r"[a-z]+", report.lower())), []
    for _, what in FORM.findall(text):
        words = re.findall(r"[a-z]+", what.lower())
        named = [entity for entity in entities if set(_forms(entity)) & set(words)]
        if len(named) != 1:
            raise Malformed(f"{what!r} names {len(named)} of the entities, not one")
        invented = [w for w in words if w not in known and w not in _forms(named[0])]
        if invented:
            raise Malformed(f"{what!r} has words that the report has not: {', '.join(invented)}")
        found += named
    if twice := sorted({entity for entity in found if found.count(entity) > 1}):
        raise Malformed(f"named twice: {', '.join(twice)}")
    if missing := [entity for entity in entities if entity not in found]:
        raise Malformed(f"left out: {', '.join(missing)}")
    return text


# --- back ends --------------------------------------------------------------------------------------------------------


class Rules:
    """Statements by rules, offline: the sentence of an entity decides whether it is present, possible or absent."""

    name = "rules 3"

    def __call__(self, report: str, entities: Sequence[str], attempt: int = 0) -> str:
        return " ".join(self._statement(report, entity, entities) for entity in entities)

    def _statement(self, report: str, entity: str, entities: Sequence[str]) -> str:
        """An entity in several sentences is present if it is in one of them."""
        found: dict[str, str] = {}
        # in "no consolidation, effusion or pneumothorax" none describes another
        ends = _UNDESCRIBING | {form for other in entities for form in _forms(other)}
        # a conjunction ends a negation: "no pneumothorax, but a small effusion"
        for sentence in re.split(r"[.;\n]|\b(?:but|however|although|though|except)\b", report.lower()):
            words = re.findall(r"[a-z]+", sentence)
            at = next((i for i, word in enumerate(words) if word in _forms(entity)), None)
            if at is None:
                continue
            first = at
            while first and at - first < 3 and words[first - 1] not in ends:
                first -= 1
            sides = " ".join(words[:at]), " ".join(words[at + 1 :])
            absent, doubtful = (
                any(re.search(pattern, side) for pattern, side in zip(patterns, sides, strict=True))
                for patterns in (ABSENT, DOUBTFUL)
            )
            # "cannot be excluded" contains "not", so uncertainty is tested before absence
            kind = "may be" if doubtful else "is no" if absent else "is"
            found.setdefault(kind, " ".join([*words[first:at], entity]))
        kind = next(k for k in ("is", "may be", "is no") if k in found)
        return f"There {kind} {found[kind]}."


class Generator:
    """A text-generation model of `transformers`: greedy decoding, and sampling after a refused answer.

    Args:
        name: of the hub, or a folder.
        download: download it when it is not cached.
        tokens: longest answer.
        device: of the model.

    Raises `MissingWeights`: it is not cached, and `download` is False or failed.
    """

    def __init__(self, name: str, *, download: bool = False, tokens: int = 256, device: str = "cpu"):
        from huggingface_hub import constants
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from ...backbones import unreachable

        reason = unreachable() if download else ""
        here = {"local_files_only": not download or bool(reason)}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, **here)
            self.model = AutoModelForCausalLM.from_pretrained(name, **here).to(device).eval()
        except (OSError, ValueError) as error:
            ways = [f"Generator({name!r}, download=True), on a machine with a network", "a folder that holds the model"]
            raise MissingWeights(name, constants.HF_HUB_CACHE, ways, reason) from error
        # of the cached answers: a longer one may be complete where this one was refused
        self.name, self.tokens, self.device = f"{name}, {tokens} tokens", tokens, device

    def __call__(self, report: str, entities: Sequence[str], attempt: int = 0) -> str:
        import torch

        text = PROMPT.format(entities=", ".join(entities), report=report)
        if self.tokenizer.chat_template:
            chat = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        # a chat template has written the special tokens already
        special = not self.tokenizer.chat_template
        given = self.tokenizer(text, return_tensors="pt", return_token_type_ids=False, add_special_tokens=special)
        given = given.to(self.device)
        sampling = {"do_sample": True, "temperature": 0.7} if attempt else {"do_sample": False}
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(attempt)
            out = self.model.generate(
                **given, max_new_tokens=self.tokens, pad_token_id=self.tokenizer.eos_token_id, **sampling
            )
        return self.tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)


# --- all reports ------------------------------------------------------------------------------------------------------


def distil(
    reports: Sequence[str],
    back_end: BackEnd,
    cache: str | Path,
    *,
    entities: Sequence[str] = ENTITIES,
    tries: int = TRIES,
) -> Distilled:
    """The statements of each report; of a report without entities there are none.

    Args:
        cache: an SQLite file, created when it does not exist. Answers, refused ones too, are cached by the report's
            text, the back end, the prompt, the entities and `tries`.
        tries: answers that are generated before the last one is refused.

    Raises `CorruptFile`: `cache` is another kind of file.
    """
    statements, refused = [], {}
    with _open(cache) as file:
        for i, report in enumerate(progress(reports, "distilling", len(reports))):
            named = entities_in(report, entities)
            if not named:
                statements.append("")
                continue
            key = hashlib.sha256("\0".join([back_end.name, PROMPT, str(tries), *named, report]).encode()).hexdigest()
            row = file.execute("SELECT text, why FROM answers WHERE key = ?", (key,)).fetchone()
            if row is None:
                row = _ask(back_end, report, named, tries)
                with file:  # written completely or not at all
                    file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", (key, *row))
            statements.append(row[0])
            if row[1]:
                refused[i] = row[1]
    return Distilled(statements, refused)


def _ask(back_end: BackEnd, report: str, entities: Sequence[str], tries: int) -> tuple[str, str]:
    """The accepted text and "", or "" and the reason why the last answer was refused."""
    why = ""
    for attempt in range(tries):
        try:
            return check(back_end(report, entities, attempt), report, entities), ""
        except Malformed as error:
            why = str(error)
    return "", why


@contextlib.contextmanager
def _open(path: str | Path) -> Iterator[sqlite3.Connection]:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    file = sqlite3.connect(path)
    try:
        file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT NOT NULL, why TEXT NOT NULL)")
        yield file
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            raise CannotWrite(path, shutil.disk_usage(Path(path).parent).free) from error
        raise CorruptFile(path, f"not a file of distilled reports ({error})") from error
    finally:
        file.close()
