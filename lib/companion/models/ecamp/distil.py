"""Entity-centred context distillation: one plain statement for each entity of a report (section 3.8).

    There is small right pleural effusion. There may be pneumonia. There is no pneumothorax.

Pre-training inserts these sentences into the report (`text.splice`). The authors generated them with a Vicuna; which
one, and its full prompt, was not found. Here any text-generation model of `transformers` can be used, or `Rules`,
offline. Every answer is checked: one of another form, or with words that are not in the report, is regenerated, and
finally refused. Answers are cached in a file, so that a killed run resumes.

    cache = "distilled.sqlite"
    distilled = distil(reports, Rules(), cache)                              # or Generator("lmsys/vicuna-7b-v1.5")
    distilled.statements[0], distilled.refused                               # "" where no answer was accepted
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
import shutil
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pandas as pd

from ...data.openi import Report
from ...errors import BadParameter, CannotWrite, CompanionError, CorruptFile, MissingWeights, extra, typed
from ...io.papers import paper
from ...io.progress import progress
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
HEADINGS: dict[str, list[str]] = paper("ecamp")["headings"]
COMMIT = 1.0  # seconds between two writes of answers: each waits for the disk, a hundred times longer than the rules

# phrases that negate or question a finding, before or after its name in the sentence
ABSENT = (
    r"\b(no|not|without|neither|nor|resolved|free of|clear of|negative for|rather than)\b"
    r"|\b(absence|lack|resolution|removal) of\b",
    r"\b(absent|none|no longer|excluded|ruled out)\b"
    r"|\bnot (seen|present|identified|evident|visible|visuali[sz]ed|demonstrated|appreciated|detected)\b"
    r"|(?<!not )(?<!not completely )(?<!not fully )(?<!partially )\b(resolved|cleared|disappeared|removed|gone)\b",
)
DOUBTFUL = (
    r"\b(may|might|could|possibl[ey]|probabl[ey]|\w*likely|suspected|suspicio\w*|suggest\w*|concern\w*|question\w*"
    r"|versus|exclude|rule out)\b",
    r"\b(possible|\w*likely|suspected|questioned|be considered|(not|cannot|to) [a-z ]*(excluded?|ruled? out))\b"
    r"|^ versus\b",
)
# a sign that is absent is no doubt: "no opacity suggesting pneumonia"
UNSUSPECTED = r"\b(no|not|nothing|without)\b((?!,| and ).)*(suggest|concern|suspicio|question)"
# what ends a negation or a doubt before a finding: "no change in the effusion", "compared to May, there is an effusion"
ENDED = (
    r".*\b((no|not|without)\b[^,]*\b((change|increase|decrease)s? in|(change|enlargement|progression|worsening) of)"
    r"|there (is|are|was|were|has been|have been))\b"
)
MONTH = r"\b(in|since|from|dated) may\b|\bmay(?=,? (of )?\d)"
# words before an entity that do not describe it: a description ends at them
_PLAIN = """
    a an the of and or in on at to with for is are was were be been has have there this that these those no not without
    may might could possible possibly probable probably likely suspected evidence any seen noted which as from by than
    but however also it its represent represents reflect reflects suggest suggests suggesting indicate indicates
    concerning question versus due consistent compatible neither nor exclude
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
    return list(dict.fromkeys(forms[word] for word in _words(report) if word in forms))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _forms(entity: str) -> tuple[str, str]:
    """Singular and plural."""
    word = entity.lower()
    for ending, plural in (("y", "ies"), ("is", "es"), ("s", "ses"), ("x", "xes")):
        if word.endswith(ending):
            return word, word.removesuffix(ending) + plural
    return word, word + "s"


_ANY = "|".join(form for entity in ENTITIES for form in _forms(entity))
# a statement after a finding, up to that of another one: "the effusion is small, and pneumothorax is absent"
_OWN = rf"(.*?\b(?:is|are|was|were|has|have|remains?)\b.*?)(?:,|\band\b).*\b(?:{_ANY})\b.*"


def check(answer: str, report: str, entities: Sequence[str]) -> str:
    """The answer with single spaces, if it is valid.

    Raises:
        Malformed: text of another form; an entity that is missing or named twice; a sentence without an entity;
            descriptions with words that are not in the report.
    """
    text, named = " ".join(answer.split()), []
    if not text:
        raise Malformed("the answer is empty")
    if rest := FORM.sub("", text):
        raise Malformed(f"not of the form 'There is X.', 'There may be X.' or 'There is no X.': {rest[:60]!r}")
    for _, what in FORM.findall(text):
        words = _words(what)
        of = [entity for entity in entities if {*_forms(entity)} & {*words}]
        if len(of) != 1:
            raise Malformed(f"{what!r} names {len(of)} of the entities, not one")
        if invented := set(words) - {*_words(report), *_forms(of[0])}:
            raise Malformed(f"{what!r} has words that the report has not: {', '.join(sorted(invented))}")
        named += of
    if sorted(named) != sorted(entities):
        raise Malformed(f"it names {', '.join(named)}, not each of {', '.join(entities)} once")
    return text


# --- back ends --------------------------------------------------------------------------------------------------------


class Rules:
    """Statements by rules, offline: the sentence of an entity decides whether it is present, possible or absent."""

    name = "rules 4"

    def __call__(self, report: str, entities: Sequence[str], attempt: int = 0) -> str:
        """Raises `BadParameter`: an entity that the report does not name."""
        return " ".join(self._statement(report, entity, entities) for entity in entities)

    def _statement(self, report: str, entity: str, entities: Sequence[str]) -> str:
        """An entity in several sentences is present if it is in one of them."""
        described: dict[str, str] = {}  # the entity with its descriptors, by kind of statement
        # in "no consolidation, effusion or pneumothorax" none describes another
        ends = _UNDESCRIBING | {form for other in entities for form in _forms(other)}
        named = rf"(?<![a-z])({'|'.join(_forms(entity))})(?![a-z])"
        text = re.sub(r"[^\S\n]+", " ", re.sub(MONTH, "", report.lower().replace("vs.", "versus")))
        # a conjunction ends a negation: "no pneumothorax, but a small effusion"
        for sentence in re.split(r"\.(?!\d)|[;\n]|\b(?:but|however|although|though|except)\b", text):
            if not (at := re.search(named, sentence)):
                continue
            before, after = re.sub(ENDED, "", sentence[: at.start()]), re.sub(_OWN, r"\1", sentence[at.end() :])
            doubted = re.search(DOUBTFUL[0], before) and not re.search(UNSUSPECTED, before)
            # "cannot be excluded" contains "not", so uncertainty is tested before absence
            if doubted or re.search(DOUBTFUL[1], after):
                kind = "may be"
            else:
                kind = "is no" if re.search(ABSENT[0], before) or re.search(ABSENT[1], after) else "is"
            nearest = itertools.takewhile(lambda word: word not in ends, _words(sentence[: at.start()])[:-4:-1])
            described.setdefault(kind, " ".join([*[*nearest][::-1], entity]))
        if not described:
            raise BadParameter("entities", entity, f"those that the report names: {entities_in(report)}")
        kind = next(k for k in ("is", "may be", "is no") if k in described)
        return f"There {kind} {described[kind]}."


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

        from ...backbones import unreachable

        with extra("xrays"):
            from transformers import AutoModelForCausalLM, AutoTokenizer

        reason = unreachable() if download else ""
        here = {"local_files_only": not download or bool(reason)}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, **here)
            self.model = AutoModelForCausalLM.from_pretrained(name, **here).to(device).eval()
        except (OSError, ValueError) as error:
            ways = [f"Generator({name!r}, download=True), on a machine with a network", "a folder that holds the model"]
            raise MissingWeights(name, constants.HF_HUB_CACHE, ways, reason) from error
        # of the cached answers: a longer one may be complete where this one was refused
        self.name, self.tokens = f"{name}, {tokens} tokens", tokens

    def __call__(self, report: str, entities: Sequence[str], attempt: int = 0) -> str:
        import torch

        text = PROMPT.format(entities=", ".join(entities), report=report)
        if chat := self.tokenizer.chat_template is not None:  # it writes the special tokens
            messages = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = self.tokenizer(text, return_tensors="pt", return_token_type_ids=False, add_special_tokens=not chat)
        prompt = prompt.to(self.model.device)
        sampling = {"do_sample": True, "temperature": 0.7} if attempt else {"do_sample": False}
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(attempt)
            end = self.tokenizer.eos_token_id
            out = self.model.generate(**prompt, max_new_tokens=self.tokens, pad_token_id=end, **sampling)
        return self.tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


# --- all reports ------------------------------------------------------------------------------------------------------


@typed
def distil(reports: Sequence[str], back_end: BackEnd, cache: str | Path) -> Distilled:
    """The statements of each report; of a report without entities there are none.

    Args:
        cache: an SQLite file, created when it does not exist. Answers, refused ones too, are cached by the report's
            text, the back end, the prompt and the entities. A run that is killed loses those of the last second.

    Raises `CorruptFile`: `cache` is another kind of file.
    """
    statements, refused = [], {}
    Path(cache).parent.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.closing(sqlite3.connect(cache)) as file:
            file.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT NOT NULL, why TEXT NOT NULL)"
            )
            written = time.monotonic()
            try:
                for i, report in enumerate(progress(reports, "distilling", len(reports))):
                    entities, row = entities_in(report), ("", "")
                    if entities:
                        facts = "\0".join([back_end.name, PROMPT, str(TRIES), *entities, report])
                        key = hashlib.sha256(facts.encode()).hexdigest()
                        row = file.execute("SELECT text, why FROM answers WHERE key = ?", (key,)).fetchone()
                    if row is None:
                        row = _ask(back_end, report, entities)
                        file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", (key, *row))
                        if time.monotonic() - written >= COMMIT:
                            file.commit()
                            written = time.monotonic()
                    statements.append(row[0])
                    if row[1]:
                        refused[i] = row[1]
            finally:  # also of a run that is interrupted, or whose back end fails
                file.commit()
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            raise CannotWrite(cache, shutil.disk_usage(Path(cache).parent).free) from error
        raise CorruptFile(cache, f"not a file of distilled reports ({error})") from error
    return Distilled(statements, refused)


def _ask(back_end: BackEnd, report: str, entities: Sequence[str]) -> tuple[str, str]:
    """The accepted text and "", or "" and the reason why the last answer was refused."""
    why = ""
    for attempt in range(TRIES):
        try:
            return check(back_end(report, entities, attempt), report, entities), ""
        except Malformed as error:
            why = str(error)
    return "", why


# --- real reports: statements and the headings assigned by coders -----------------------------------------------------


def statements(reports: Sequence[Report]) -> pd.DataFrame:
    """The rules' statement on each entity of `HEADINGS` in each report, one row per pair.

    Columns: report, entity, `stated` ("is", "may be", "is no", or "" if the report does not name it), `coded` (whether
    it has a heading).
    """
    rules, rows = Rules(), []
    for report in reports:
        named = entities_in(report.text, [*HEADINGS])
        stated = {entity: FORM.findall(rules(report.text, [entity]))[0][0] for entity in named}
        rows += [(report.name, e, stated.get(e, ""), bool(report.headings & {*HEADINGS[e]})) for e in HEADINGS]
    return pd.DataFrame(rows, columns=["report", "entity", "stated", "coded"])


def agreement(rows: pd.DataFrame) -> pd.DataFrame:
    """Precision and recall of the statements by entity, the most often coded first, and all entities together in the
    last row.

    A report is positive for an entity when its statement is "There is X." or "There may be X.". The headings are a
    reference, not ground truth: coders omit old or unimportant findings, and may use another heading.

    Args:
        rows: of `statements`.

    Columns: entity; coded, positive, negated (reports); precision and recall in percent (NaN if there are none).
    """
    positive, negated = rows.stated.isin(["is", "may be"]), rows.stated == "is no"
    counts = pd.DataFrame({"coded": rows.coded, "positive": positive, "negated": negated, "hit": positive & rows.coded})
    counts = counts.groupby(rows.entity).sum().sort_values("coded", ascending=False, kind="stable")
    counts.loc["all"] = counts.sum()
    hit = 100 * counts.pop("hit")
    return counts.assign(precision=hit / counts.positive, recall=hit / counts.coded).reset_index()
