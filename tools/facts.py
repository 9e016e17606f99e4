"""Check the files of facts, first of all in `make lint`: `python -m tools.facts`.

These are `paper.yaml`, `findings.yaml` and `threads.yaml` of each paper, `models/parameters.yaml`, and the data sets'
`data/*_sets.yaml`. `tools/schema.yaml` has their keys. What it cannot say is checked here: that what a file names
exists, in the file itself, the code, the notebook, the study and the recorded cases. Prints each fault as
`path:line: key: what is wrong; accepted: ...`; returns 1 if there is any.
"""

from __future__ import annotations

import importlib
import itertools
import json
import re
import string
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import yaml

from companion.evaluation.claims import PAPER, SYNTHETIC
from companion.io import papers
from companion.io.files import read_json

ROOT = Path(__file__).parents[1]
SCHEMA = yaml.safe_load(Path(__file__).with_name("schema.yaml").read_text(encoding="utf-8"))
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
CLAIMS, METHODS, SEEDS, FIRST_SEED = 5, 6, 5, 200  # at most, at most, at least, at least


class Fault(NamedTuple):
    """What is wrong at a path of keys of a file, and what is accepted there ("" where that is not a list)."""

    path: tuple[str | int, ...]
    what: str
    accepted: object = ""


class Facts:
    """A file: its content as JSON has it, the line of each path of keys, and the faults of its keys.

    Args:
        kind: which of the definitions of tools/schema.yaml.
    """

    def __init__(self, file: Path, kind: str):
        self.file, self.content = file, None
        self.lines: dict[tuple[str | int, ...], int] = {(): 1}
        self.faults: list[Fault] = []
        text = file.read_text(encoding="utf-8")
        try:
            self._find(yaml.compose(text, Loader=LOADER), ())
            self.content = json.loads(json.dumps(yaml.load(text, LOADER), default=str))
        except yaml.YAMLError as error:
            self.lines[()] = (mark.line if (mark := getattr(error, "problem_mark", None)) else 0) + 1
            self.faults.append(Fault((), f"not YAML: {error}", "a YAML mapping or list"))
            return
        found = jsonschema.Draft202012Validator({**SCHEMA, "$ref": f"#/$defs/{kind}"}).iter_errors(self.content)
        self.faults += dict.fromkeys(fault for error in found for fault in _of_schema(error))

    def _find(self, node: yaml.Node | None, path: tuple[str | int, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if (inner := (*path, key.value)) in self.lines:
                    self.faults.append(Fault(inner, f"a second time, first in line {self.lines[inner]}"))
                self.lines[inner] = key.start_mark.line + 1
                self._find(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                self.lines[*path, i] = value.start_mark.line + 1
                self._find(value, (*path, i))

    def told(self, faults: Iterable[Fault]) -> Iterator[str]:
        """One line of text for each fault."""
        for path, what, accepted in faults:
            known = next(path[:k] for k in range(len(path), -1, -1) if path[:k] in self.lines)
            listed = accepted if isinstance(accepted, str) else ", ".join(map(str, accepted))  # type: ignore[call-overload]
            key = ".".join(map(str, path)) or "the file"
            yield f"{self.file}:{self.lines[known]}: {key}: {what}{f'; accepted: {listed}' if listed else ''}"


def _of_schema(error: jsonschema.ValidationError) -> Iterator[Fault]:
    """The faults of an error of jsonschema: of each unknown and each missing key its own."""
    path, wanted = tuple(error.absolute_path), error.validator_value
    if error.validator == "additionalProperties" and wanted is False:
        known = error.schema["properties"]
        for key in error.instance.keys() - known.keys():
            yield Fault((*path, key), "unknown key", tuple(known))
    elif error.validator == "required":
        for key in [key for key in wanted if key not in error.instance]:
            yield Fault((*path, key), "missing")
    else:
        accepted = tuple(wanted) if isinstance(wanted, list) else f"{error.validator} {wanted}"
        yield Fault(path, textwrap.shorten(error.message, 120), accepted)


def unknown(path: tuple[str | int, ...], names: Iterable[Any], known: Iterable[Any], what: str) -> Iterator[Fault]:
    """A fault for each of `names` that is not `known`."""
    known = list(known)
    for name in names:
        if name not in known:
            yield Fault(path, f"{name!r} is no {what}", known)


def data_sets() -> dict[str, Any]:
    """The registered data sets; imported here, since a wrong file of sets fails with its import."""
    return importlib.import_module("companion.data").DATASETS


def references(facts: Mapping[str, Any]) -> Iterator[Fault]:
    """Names within a paper's file, and of data sets."""
    for kind, key in (("tables", "id"), ("claims", "id"), ("weights", "name"), ("runs", "id")):
        names = [part[key] for part in facts[kind]]
        for i, name in enumerate(names):
            if name in names[:i]:
                yield Fault((kind, i, key), f"{name!r} a second time")
    tables, weights = ([part[key] for part in facts[kind]] for kind, key in (("tables", "id"), ("weights", "name")))
    for i, run in enumerate(facts["runs"]):
        yield from unknown(("runs", i, "tables"), run["tables"], tables, "table")
        yield from unknown(("runs", i, "weights"), run["weights"], weights, "name of weights")
        if not any(n == run["data"] or (run["data"].endswith("/") and n.startswith(run["data"])) for n in data_sets()):
            yield Fault(("runs", i, "data"), f"{run['data']!r} is no data set, and no group/", tuple(data_sets()))
    for i, table in enumerate(facts["tables"]):
        for j, row in enumerate(table["rows"]):
            yield from unknown(
                ("tables", i, "rows", j, "values"), row["values"], table["columns"], "column of the table"
            )
    synthetic = [claim["id"] for claim in facts["claims"] if claim["kind"] == SYNTHETIC]
    for i, finding in enumerate(facts["findings"]):
        claims = [finding["claim"]] if "claim" in finding else []
        yield from unknown(("findings", i, "claim"), claims, synthetic, "synthetic result")


def choices(slug: str, folder: Path, rules: Mapping[str, Mapping[str, Any]]) -> Iterator[Fault]:
    """The accepted values of parameters: those of the code, by `choices_of`, and names of data sets."""
    for name, rule in rules.items():
        path, listed = ("parameters", name, "choices"), rule.get("choices", ())
        yield from unknown(path, [c for c in listed if "/" in str(c)], data_sets(), "data set")
        accepted: list[Any] = []
        for source in rule.get("choices_of", ()):
            module, colon, constant = source.partition(":")
            if not colon:
                accepted.append(source)
            elif module == "data":
                sets = data_sets().values()
                accepted += [found.name for found in sets if found.task == constant and found.group != "pocket"]
            elif module.endswith(".yaml"):
                accepted += Facts(folder / module, "named").content[constant]
            else:
                try:
                    accepted += getattr(importlib.import_module(f"companion.models.{slug}.{module}"), constant)
                except (ImportError, AttributeError) as error:
                    yield Fault(("parameters", name, "choices_of"), f"{source}: {error}")
                    accepted += listed
        if accepted:
            yield from unknown(path, listed, accepted, f"choice of {', '.join(rule['choices_of'])}")
            for missing in [value for value in accepted if value not in listed]:
                yield Fault(path, f"{missing!r} is missing, which the code accepts", accepted)


class Templates:
    """The names that templates of rows and columns of `results` can give, by the values that their fields can have."""

    def __init__(self, facts: Mapping[str, Any], rules: Mapping[str, Mapping[str, Any]]):
        self.results, self.rules = facts["results"], rules

    def known(self, spec: Mapping[str, Any], field: str) -> list[Any]:
        """The values of a field, by `where` or the choices of the parameter of that name; [] for any."""
        given = spec.get("where", {}).get(field, self.rules.get(field, {}).get("choices", ()))
        return list(given) if isinstance(given, list | tuple) else [given]

    def pattern(self, spec: Mapping[str, Any], what: str, chosen: Mapping[str, Any] = {}) -> re.Pattern[str]:
        """What the template `what` of an entry of `cells` gives, with values `chosen` for some of its fields."""
        found = ""
        for text, field, _, _ in string.Formatter().parse(spec[what]):
            found += re.escape(text)
            if field == "metric":
                found += f"(?:{'|'.join(map(re.escape, self.metrics(spec)))})"
            elif field is not None:
                values = [chosen[field]] if field in chosen else self.known(spec, field)
                names = self.results.get("names", {}).get(field, {})
                each = "|".join(re.escape(str(names.get(str(value), value))) for value in values)
                found += f"(?:{each})(?:, .+)?" if values else ".+"
        return re.compile(found)

    def metrics(self, spec: Mapping[str, Any]) -> list[str]:
        """The names of scores in the columns of an entry."""
        return list(spec["metrics"].values()) if "metrics" in spec else self.results["values"]

    def missing(self, spec: Mapping[str, Any], columns: list[str]) -> Iterator[dict[str, Any]]:
        """The values of the column's fields for which none of `columns` is filled."""
        fields = [f for _, f, _, _ in string.Formatter().parse(spec["column"]) if f and self.known(spec, f)]
        for values in itertools.product(*(self.known(spec, field) for field in fields)):
            chosen = dict(zip(fields, values, strict=True))
            if not any(map(self.pattern(spec, "column", chosen).fullmatch, columns)):
                yield chosen


def results(slug: str, facts: Mapping[str, Any], rules: Mapping[str, Mapping[str, Any]]) -> Iterator[Fault]:
    """The cells of tables and claims that measured rows fill, and the claims that need them."""
    templates, found = Templates(facts, rules), facts["results"]
    columns = {table["id"]: table["columns"] for table in facts["tables"]}
    entries = [(("results", "cells", table), spec) for table, spec in found.get("cells", {}).items()]
    yield from unknown(("results", "cells"), found.get("cells", {}), columns, "table")
    for (*_, table), spec in [entry for entry in entries if entry[0][-1] in columns]:
        for chosen in templates.missing(spec, columns[table]):
            what = ", ".join(f"{field} {value}" for field, value in chosen.items()) or spec["column"]
            yield Fault(
                ("results", "cells", table, "column"), f"no column of {table} is that of {what}", columns[table]
            )
    claims = list(enumerate(found.get("claims", ())))
    entries += [(("results", "claims", i), spec) for i, spec in claims]
    for path, spec in entries:
        yield from unknown((*path, "where"), spec.get("where", ()), found["keys"], "key of results")
        yield from unknown((*path, "metrics"), spec.get("metrics", ()), found["values"], "value of results")
        for field in [field for field in spec.get("where", ()) if "choices" in rules.get(field, ())]:
            given = [str(value).partition(", ")[0] for value in templates.known(spec, field)]
            yield from unknown((*path, "where", field), given, map(str, rules[field]["choices"]), f"choice of {field}")
    for field in [field for field in found.get("names", ()) if "choices" in rules.get(field, ())]:
        given, accepted = found["names"][field], map(str, rules[field]["choices"])
        yield from unknown(("results", "names", field), given, accepted, f"choice of {field}")
    recipe = importlib.import_module(f"companion.models.{slug}.recipe")
    for i, spec in enumerate(facts.get("computed", ())):
        yield from unknown(("computed", i, "by"), [spec["by"]], vars(recipe), "function of the recipe")
    written = [spec for _, spec in claims] + facts.get("computed", [])
    cells = [[templates.pattern(spec, what) for what in ("row", "column")] for spec in written]
    for i, claim in enumerate(facts["claims"]):
        for j, condition in enumerate(claim.get("measured", ())):
            for key in [key for key in ("of", "over") if key in condition]:
                if not any(all(map(re.Pattern.fullmatch, cell, condition[key])) for cell in cells):
                    forms = [f"{spec['row']} | {spec['column']}" for spec in written]
                    what = f"no measured row fills {' | '.join(condition[key])}"
                    yield Fault(("claims", i, "measured", j, key), what, forms)


def study(slug: str, facts: Mapping[str, Any]) -> Iterator[Fault]:
    """The synthetic results: of tasks and methods of the study, few, on enough unseen seeds, with reasons of failure."""
    own = importlib.import_module(f"companion.toy.{slug}").STUDY
    if {*facts["data_built_for"]} != {*own.tasks}:
        yield Fault(("data_built_for",), f"{', '.join(facts['data_built_for'])}: not the tasks of the study", own.tasks)
    if len(own.seeds) < SEEDS or min(own.seeds) < FIRST_SEED:
        what = f"the study is tested on the seeds {', '.join(map(str, own.seeds))}"
        yield Fault(("data_built_for",), what, f"{SEEDS} or more, each {FIRST_SEED} or more")
    for task, methods in own.tasks.items():
        if len(methods) > METHODS:
            yield Fault(("data_built_for", task), f"{len(methods)} methods", f"at most {METHODS}")
    ledger = ROOT / "reports" / "pocket" / slug / "claims.json"
    status = {claim["id"]: claim["status"] for claim in read_json(ledger)} if ledger.exists() else {}
    synthetic = [(i, claim) for i, claim in enumerate(facts["claims"]) if claim["kind"] == SYNTHETIC]
    if len(synthetic) > CLAIMS:
        yield Fault(("claims", synthetic[CLAIMS][0]), f"{len(synthetic)} synthetic results", f"at most {CLAIMS}")
    for i, claim in synthetic:
        yield from unknown(("claims", i, "tasks"), claim["tasks"], own.tasks, "task of the study")
        for task in [task for task in claim["tasks"] if task in own.tasks]:
            for role in [role for role in ("better", "worse") if role in claim]:
                yield from unknown(("claims", i, role), [claim[role]], own.tasks[task], f"method of the task {task}")
        if status.get(claim["id"]) == "fails" and "why" not in claim:
            yield Fault(("claims", i, "why"), "missing: the claim fails")


def drawn(slug: str, facts: Mapping[str, Any]) -> Iterator[Fault]:
    """The figure of the first screen: one of the notebook's."""
    cells = read_json(ROOT / "notebooks" / f"{slug}.ipynb")["cells"]
    named = re.findall(r'run\.figure\(\s*"([^"]+)"', "\n".join("".join(cell["source"]) for cell in cells))
    yield from unknown(("figure",), [facts["figure"]], named, "figure of the notebook")


def cases(slug: str, rows: list[Mapping[str, Any]]) -> Iterator[Fault]:
    """The recorded cases that findings name."""
    recorded = [
        file.parent.name
        for root in ("parity", "recipes")
        for file in (ROOT / "tests" / root / slug).glob("*/case.json")
    ]
    for i, row in enumerate(rows):
        yield from unknown((i, "case"), [row["case"]] if row.get("case") else [], recorded, "recorded case")


def asked(facts: Mapping[str, Any]) -> Iterator[Fault]:
    """The threads that rows on lower numbers name."""
    read = [name for name, thread in facts["threads"].items() if thread["state"] != "not read"]
    for i, row in enumerate(facts["lower"]):
        yield from unknown(("lower", i, "threads"), row.get("threads", ()), read, "thread that was read")


def check_paper(folder: Path) -> Iterator[str]:
    """The faults of the files of a paper, one line of text each. The folder's name is the slug."""
    slug, common = folder.name, Facts(papers.MODELS / "parameters.yaml", "parameters")
    paper = Facts(folder / "paper.yaml", "paper")
    faults = paper.faults
    if not faults:
        facts = paper.content
        rules = common.content | facts["parameters"]
        faults = [*unknown(("slug",), [facts["slug"]], [slug], "name of the folder")]
        faults += [*references(facts), *choices(slug, folder, facts["parameters"]), *results(slug, facts, rules)]
        faults += [*study(slug, facts), *drawn(slug, facts)]
    yield from paper.told(faults)
    for kind, rule in (("findings", lambda rows: cases(slug, rows)), ("threads", asked)):
        if (file := folder / f"{kind}.yaml").exists():
            other = Facts(file, kind)
            yield from other.told(other.faults or rule(other.content))


def check_file(file: Path, kind: str) -> list[str]:
    """The faults of a file of no paper."""
    facts = Facts(file, kind)
    return [*facts.told(facts.faults)]


def main() -> int:
    """Print the faults of all files; 1 if there is any."""
    found = check_file(papers.MODELS / "parameters.yaml", "parameters")
    for file in sorted((papers.MODELS.parent / "data").glob("*_sets.yaml")):
        found += check_file(file, "sets")
    if not found:  # which the package reads when it is imported
        found = [line for slug in papers.slugs() for line in check_paper(papers.MODELS / slug)]
    print("\n".join(found) or f"the facts of {len(papers.slugs())} papers are right")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
