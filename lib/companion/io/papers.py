"""Facts of the papers, from `models/<slug>/paper.yaml`: citation, claims, tables, and the notebook's parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..errors import BadParameter, CorruptFile, check_choice

MODELS = Path(__file__).parents[1] / "models"


def slugs() -> list[str]:
    """The short names of the papers, sorted."""
    return sorted(path.parent.name for path in MODELS.glob("*/paper.yaml"))


@cache
def paper(slug: str) -> dict:
    """The facts of a paper, `models/<slug>/paper.yaml`, whose keys `make lint` checks.

    Raises `BadParameter` for an unknown slug, `CorruptFile` where the file is no YAML mapping.
    """
    check_choice("paper", slug, slugs())
    path = MODELS / slug / "paper.yaml"
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise CorruptFile(path, f"expected a YAML mapping: {error}") from error


def diagram(slug: str) -> str:
    """The path of the architecture diagram of a paper, models/<slug>/architecture.svg."""
    check_choice("paper", slug, slugs())
    return str(MODELS / slug / "architecture.svg")


def papers_with(weights: str) -> list[str]:
    """The short names of the papers that use the weights of that name on the hub."""
    return [slug for slug in slugs() if any(entry.get("id") == weights for entry in paper(slug)["weights"])]


FINDINGS = ("fault", "surprise", "recipe")


@cache
def findings(slug: str) -> list[dict]:
    """What the authors' code does that the paper does not state, from models/<slug>/findings.yaml; [] without that
    file.

    Each is a dict: `topic`; `kind`, one of `FINDINGS` (unintended; unexpected; a setting that only the code states);
    `paper`, `code` and `here`, the behaviour of each ("" where unknown); `where`, from lines of the code at the commit
    of paper.yaml to a name or literal on them, see tools/findings.py; `effect`, as measured by us ("" if not
    measured); `case`, the recorded case that shows it.
    """
    check_choice("paper", slug, slugs())
    path = MODELS / slug / "findings.yaml"
    given = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else []
    return [{"paper": "", "where": {}, "effect": "", "case": ""} | row for row in given]


@cache
def threads(slug: str) -> dict[str, Any]:
    """What others asked about the paper's numbers, from models/<slug>/threads.yaml.

    `threads`, by "owner/name#number": `state`, the day `read`, what was `seen` and `answered` ("" if nothing was), in
    our words. `lower`, rows on numbers below the published ones: what one may `see`, `threads` that report it, the
    likely `cause` (`guess`: no thread says it), and what to `set`.
    """
    check_choice("paper", slug, slugs())
    return yaml.safe_load((MODELS / slug / "threads.yaml").read_text(encoding="utf-8"))


def rules(slug: str) -> dict[str, dict]:
    """The rule of each parameter of a notebook, of a paper or "pocket": its type and accepted values; the common ones,
    then the paper's own.

    Types: `switch`; `integer` and `number` (from `low` to `high`; `zero`: or 0); `choice` (one of `choices`); `list`
    (some of `choices`, separated by commas); `text` (anything; `examples` names usual values).
    """
    return _common() | ({} if slug == "pocket" else paper(slug).get("parameters", {}))


@cache
def _common() -> dict[str, dict]:
    return yaml.safe_load((MODELS / "parameters.yaml").read_text(encoding="utf-8"))


def accepted(rule: Mapping) -> str:
    """The accepted values of a rule as text."""
    kind = rule["type"]
    if kind == "switch":
        return "true | false"
    if kind in ("integer", "number"):
        low, high = rule.get("low", -math.inf), rule.get("high", math.inf)
        zero = ", or 0" if rule.get("zero") else ""
        return f"{'a whole number' if kind == 'integer' else 'a number'} from {low:.10g} to {high:.10g}{zero}"
    if kind == "text":
        return f"text, such as {' | '.join(rule['examples'])}" if "examples" in rule else "text"
    names = " | ".join(str(choice) or "(empty)" for choice in rule["choices"])
    return f"some, between commas, of {names}" if kind == "list" else names


def convert(name: str, value: object, rule: Mapping) -> Any:
    """A parameter converted to the type of its rule: papermill passes `-p dry_run false` as the string "false", which
    is true.

    Raises `BadParameter`: with the accepted values.
    """
    kind, text = rule["type"], str(value).strip()
    if kind == "switch":
        if text.lower() in ("true", "false", "1", "0", "yes", "no"):
            return text.lower() in ("true", "1", "yes")
        raise BadParameter(name, value, (True, False))
    if kind == "choice":
        known = {str(choice): choice for choice in rule["choices"]}  # papermill passes `-p release 2025` as a number
        if text not in known:
            raise BadParameter(name, value, rule["choices"])
        return known[text]
    if kind in ("integer", "number"):
        low, high = rule.get("low", -math.inf), rule.get("high", math.inf)
        try:
            number = int(text) if kind == "integer" else float(text)
        except ValueError as error:
            raise BadParameter(name, value, accepted(rule)) from error
        if isinstance(value, bool) or not (low <= number <= high or (rule.get("zero") and number == 0)):
            raise BadParameter(name, value, accepted(rule))
        return number
    if not isinstance(value, str):
        raise BadParameter(name, value, "text, in quotes (papermill keeps a number as text with -r)")
    if kind == "list":
        names = [part.strip() for part in text.split(",") if part.strip()]
        for part in names:
            check_choice(name, part, rule["choices"])
        return ", ".join(names)
    return text
