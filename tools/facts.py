"""Check the files of facts, first of all in `make lint`: `python -m tools.facts`.

These are `paper.yaml`, `findings.yaml` and `threads.yaml` of each paper, `models/parameters.yaml`, and the data sets'
`data/*_sets.yaml`. `tools/schema.yaml` has their keys. What it cannot say is checked here: that what a file names
exists, in the file itself, the code, the notebook, the study and the recorded cases. Prints each fault as
`path:line: key: what is wrong; accepted: ...`; returns 1 if there is any.
"""

from __future__ import annotations

import itertools
import json
import re
import string
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from companion.evaluation.claims import SYNTHETIC
from companion.evaluation.tables import Results
from companion.io import papers
from companion.io.files import read_json
from companion.runs import notebooks
from tools.new_paper import PLACES

ROOT = Path(__file__).parents[1]
SCHEMA = yaml.safe_load(Path(__file__).with_name("schema.yaml").read_text(encoding="utf-8"))
CLAIMS, METHODS, SEEDS, FIRST_SEED = 5, 6, 5, 200  # synthetic results and methods at most; seeds of the test at least

Key = tuple[str | int, ...]
Fault = tuple[Key, str, Iterable]  # where in a file, what is wrong, and what is accepted (empty: nothing to list)


def from_yaml(text: str) -> Any:
    """The content of YAML text as JSON has it."""
    return json.loads(json.dumps(yaml.safe_load(text), default=str))


class Facts:
    """A file: its content as JSON has it, the line of each key, and the faults of its keys by tools/schema.yaml.

    Args:
        kind: which of the schema's definitions.
        read: the content of its text; JSON is YAML too.
    """

    def __init__(self, file: Path, kind: str, read: Callable[[str], Any] = from_yaml):
        self.file, self.content, self.faults = file, None, list[Fault]()
        self.lines: dict[Key, int] = {(): 1}
        try:
            text = file.read_text(encoding="utf-8")
            self.content = read(text)
            self._find(yaml.compose(text, yaml.SafeLoader), ())
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            self.faults.append(((), " ".join(f"cannot be read: {error}".split()), [f"{file.suffix[1:]} in UTF-8"]))
            return
        for error in jsonschema.Draft202012Validator({**SCHEMA, "$ref": f"#/$defs/{kind}"}).iter_errors(self.content):
            path, wanted = tuple(error.absolute_path), error.validator_value
            if wanted is False:
                known = error.schema["properties"]
                self.faults += [((*path, key), "unknown key", known) for key in error.instance if key not in known]
            else:
                what = textwrap.shorten(error.message, 120)
                self.faults.append(
                    (path, what, wanted if isinstance(wanted, list) else [f"{error.validator} {wanted}"])
                )

    def _find(self, node: yaml.Node | None, path: Key) -> None:
        mapping = isinstance(node, yaml.MappingNode)
        for key, value in (
            node.value if mapping else enumerate(node.value) if isinstance(node, yaml.SequenceNode) else ()
        ):
            inner, start = ((*path, key.value), key) if mapping else ((*path, key), value)
            if inner in self.lines:
                self.faults.append((inner, f"a second time, first in line {self.lines[inner]}", ()))
            self.lines[inner] = start.start_mark.line + 1
            if any("TODO" in str(part.value) for part in (start, value) if isinstance(part, yaml.ScalarNode)):
                self.faults.append((inner, "to be written (TODO)", ()))
            self._find(value, inner)

    def told(self, *rules: Callable[[Any], Iterable[Fault]]) -> Iterator[str]:
        """One line of text for each fault of the keys; if there is none, for each that `rules` find in the content."""
        for rule in () if self.faults else rules:
            try:
                self.faults.extend(rule(self.content))
            except (ImportError, AttributeError, OSError) as error:  # what is not written yet
                self.faults.append(((), str(error), ()))
        lines = []
        for path, what, accepted in self.faults:
            line = max(line for key, line in self.lines.items() if key == path[: len(key)])
            listed = f"; accepted: {', '.join(map(str, accepted))}" if accepted else ""
            lines.append(f"{self.file}:{line}: {'.'.join(map(str, path)) or 'the file'}: {what}{listed}")
        yield from dict.fromkeys(lines)


def unknown(path: Key, names: Iterable[Any], known: Iterable[Any], what: str) -> Iterator[Fault]:
    """A fault for each of `names` that is not `known`."""
    known = list(known)
    return ((path, f"{name!r} is no {what}", known) for name in names if name not in known)


def data_sets() -> dict[str, Any]:
    """The registered data sets; imported here, since a wrong file of sets fails with its import."""
    return import_module("companion.data").DATASETS


def references(facts: Mapping[str, Any]) -> Iterator[Fault]:
    """Names within a paper's file, and of data sets."""
    for kind, key in (("tables", "id"), ("claims", "id"), ("weights", "name"), ("runs", "id")):
        names = [part[key] for part in facts[kind]]
        yield from unknown((kind,), {name for name in names if names.count(name) > 1}, (), "name of one alone")
    for i, run in enumerate(facts["runs"]):
        yield from unknown(("runs", i, "tables"), run["tables"], (t["id"] for t in facts["tables"]), "table")
        yield from unknown(("runs", i, "weights"), run["weights"], (w["name"] for w in facts["weights"]), "weights")
        above = [other["id"] for other in facts["runs"][:i]]
        yield from unknown(("runs", i, "after"), [run["after"]] if "after" in run else (), above, "run above it")
        if not any(name.startswith(run["data"]) for name in data_sets()):
            yield ("runs", i, "data"), f"{run['data']!r} is no data set, nor the start of one", data_sets()
    for i, table in enumerate(facts["tables"]):
        for j, row in enumerate(table["rows"]):
            yield from unknown(("tables", i, "rows", j, "values"), row["values"], table["columns"], "column")
    synthetic = [claim["id"] for claim in facts["claims"] if claim["kind"] == SYNTHETIC]
    for i, row in enumerate(facts["findings"]):
        yield from unknown(("findings", i, "claim"), [row["claim"]] if "claim" in row else (), synthetic, SYNTHETIC)


def choices(folder: Path, facts: Mapping[str, Any]) -> Iterator[Fault]:
    """The accepted values of parameters: those of the code, by `choices_of`, and names of data sets."""
    for name, rule in facts["parameters"].items():
        path, listed, accepted = ("parameters", name, "choices"), rule.get("choices", ()), list[Any]()
        for module, colon, constant in (source.partition(":") for source in rule.get("choices_of", ())):
            if module == "data":
                accepted += [n for n, s in data_sets().items() if s.task == constant and s.group != "pocket"]
            elif module.endswith(".yaml"):
                accepted += yaml.safe_load((folder / module).read_text(encoding="utf-8"))[constant]
            elif colon:
                try:
                    accepted += getattr(import_module(f"companion.models.{folder.name}.{module}"), constant)
                except (ImportError, AttributeError) as error:
                    yield (*path[:2], "choices_of"), str(error), ()
                    accepted.clear()
                    break
            else:
                accepted.append(module)
        if accepted:
            yield from unknown(path, listed, accepted, "value that the code accepts")
            yield from unknown(path, accepted, listed, "choice, but the code accepts it")
        yield from unknown(path, [value for value in listed if "/" in str(value)], data_sets(), "data set")


def listed(value: Any) -> list:
    """A value or a list of values, as a list."""
    return value if isinstance(value, list) else [value]


def written(results: Results, rules: Mapping, spec: Mapping, changed: str = "") -> Iterator[list[tuple[str, str]]]:
    """The names of row and column of each score that an entry of `cells` can give, "*" for any text.

    Args:
        rules: of the parameters; the fields of the templates have their choices, or the values of `where`.
        changed: what may follow a value: ", *" for methods that are not as published, such as "SA²VP, s = 0.1".
    """
    named = {field for name in ("row", "column") for _, field, _, _ in string.Formatter().parse(spec[name])}
    values = {}
    for field in named - {None, "metric"}:
        found = listed(spec.get("where", {}).get(field, rules.get(field, {}).get("choices", "*")))
        values[field] = found + [f"{value}{changed}" for value in found if changed]
    for each in itertools.product(*values.values()):
        row = dict(zip(values, each, strict=True))
        columns = results.named(row, spec, "column")
        yield [(name, columns[score]) for score, name in results.named(row, spec, "row").items()]


def cells(slug: str, rules: Mapping[str, Mapping], facts: Mapping[str, Any]) -> Iterator[Fault]:
    """The cells of tables and claims that measured rows fill, and the claims that need them."""
    results, computed = Results(slug, **facts["results"]), facts.get("computed", [])
    tables = {table["id"]: table["columns"] for table in facts["tables"]}
    yield from unknown(("results", "cells"), results.cells, tables, "table")
    entries: list[tuple[Key, Mapping]] = [(("results", "cells", key), spec) for key, spec in results.cells.items()]
    for path, spec in [*entries, *((("results", "claims", i), spec) for i, spec in enumerate(results.claims))]:
        yield from unknown((*path, "where"), spec.get("where", ()), results.keys, "key of results")
        yield from unknown((*path, "metrics"), spec.get("metrics", ()), results.values, "value of results")
        for field, found in spec.get("where", {}).items():
            given = [str(value).partition(", ")[0] for value in listed(found)]
            accepted = map(str, rules.get(field, {}).get("choices", given))
            yield from unknown((*path, "where", field), given, accepted, f"choice of {field}")
        for scores in written(results, rules, spec) if path[2] in tables else ():
            if not any(fnmatchcase(column, name) for _, name in scores for column in tables[path[2]]):
                yield (*path, "column"), f"no column {' | '.join(name for _, name in scores)}", tables[path[2]]
    for i, spec in enumerate(computed):
        if not hasattr(import_module(f"companion.models.{slug}.recipe"), spec["by"]):
            yield ("computed", i, "by"), f"{spec['by']!r} is not in the recipe", ()
    specs = [*results.claims, *computed]
    found = [" | ".join(cell) for spec in specs for scores in written(results, rules, spec, ", *") for cell in scores]
    for i, claim in enumerate(facts["claims"]):
        for j, condition in enumerate(claim.get("measured", ())):
            for key in condition.keys() & {"of", "over"}:
                cell = " | ".join(condition[key])
                if not any(fnmatchcase(cell, name) for name in found):
                    forms = [f"{spec['row']} | {spec['column']}" for spec in specs]
                    yield ("claims", i, "measured", j, key), f"no measured row fills {cell}", forms


def study(slug: str, facts: Mapping[str, Any]) -> Iterator[Fault]:
    """The synthetic results: of tasks and methods of the study, few, on unseen seeds, with the reason of a failure."""
    own, path = getattr(import_module(f"companion.toy.{slug}"), "STUDY", None), ("data_built_for",)
    if own is None:
        yield path, f"toy/{slug}.py has no STUDY", ["an ablation, see companion.studies.study"]
        return
    yield from unknown(path, facts["data_built_for"], own.tasks, "task of the study")
    yield from unknown(path, own.tasks, facts["data_built_for"], "key here, but a task of the study")
    if len(own.seeds) < SEEDS or min(own.seeds) < FIRST_SEED:
        yield path, f"the study is tested on {own.seeds}", [f"{SEEDS} seeds or more, all {FIRST_SEED} or more"]
    if max(map(len, own.tasks.values())) > METHODS:
        yield path, "the study has too many methods", [f"at most {METHODS}"]
    ledger = ROOT / "reports" / "pocket" / slug / "claims.json"
    failed = [claim["id"] for claim in (read_json(ledger) if ledger.exists() else ()) if claim["status"] == "fails"]
    claims = [(i, claim) for i, claim in enumerate(facts["claims"]) if claim["kind"] == SYNTHETIC]
    for i, claim in claims:
        yield from unknown(("claims", i, "tasks"), claim["tasks"], own.tasks, "task of the study")
        for task, role in itertools.product(own.tasks.keys() & {*claim["tasks"]}, claim.keys() & {"better", "worse"}):
            yield from unknown(("claims", i, role), [claim[role]], own.tasks[task], f"method of the task {task}")
        if claim["id"] in failed and "why" not in claim:
            yield ("claims", i, "why"), "the claim fails, and no reason is given", ['a reason, or "not found"']
    if claims[CLAIMS:]:
        yield ("claims", claims[CLAIMS][0]), f"{len(claims)} synthetic results", [f"at most {CLAIMS}"]


def drawn(slug: str, facts: Mapping[str, Any]) -> Iterator[Fault]:
    """The figure of the first screen: one of the notebook's."""
    source = (ROOT / "notebooks" / f"{slug}.ipynb").read_text(encoding="utf-8")
    named = re.findall(r'run\.figure\(\\"([^"\\]+)', source)
    return unknown(("figure",), [facts["figure"]], named, "figure of the notebook")


def cases(slug: str, rows: list[Mapping[str, Any]]) -> Iterator[Fault]:
    """The recorded cases that findings name."""
    recorded = ["", *(file.parent.name for file in ROOT.glob(f"tests/*/{slug}/*/case.json"))]
    return (
        fault for i, row in enumerate(rows) for fault in unknown((i, "case"), [row.get("case", "")], recorded, "case")
    )


def asked(facts: Mapping[str, Any]) -> Iterator[Fault]:
    """The threads that rows on lower numbers name."""
    read = [name for name, thread in facts["threads"].items() if thread["state"] != "not read"]
    for i, row in enumerate(facts["lower"]):
        yield from unknown(("lower", i, "threads"), row.get("threads", ()), read, "thread that was read")


def check_paper(folder: Path) -> Iterator[str]:
    """The faults of the files of a paper, one line of text each. The folder's name is the slug."""
    slug, paper = folder.name, Facts(folder / "paper.yaml", "paper")
    rules = papers.rules("pocket") | (paper.content or {}).get("parameters", {})
    rest = (partial(choices, folder), partial(cells, slug, rules), partial(study, slug), partial(drawn, slug))
    yield from paper.told(references, *rest)
    mine = folder / "architecture.svg"
    for other in papers.slugs() if mine.exists() else ():
        if other != slug and mine.read_bytes() == Path(papers.diagram(other)).read_bytes():
            yield f"{mine}: the diagram of {other}; accepted: one of this paper"
    for place in (*PLACES.values(), "notebooks/{}.ipynb"):
        file = folder.parents[3] / place.format(slug)
        if file.exists() and file.suffix != ".yaml":
            lines = file.read_text(encoding="utf-8").splitlines()
            yield from (f"{file}:{number}: {line.strip()}" for number, line in enumerate(lines, 1) if "TODO" in line)
    for kind, rule in (("findings", partial(cases, slug)), ("threads", asked)):
        if (file := folder / f"{kind}.yaml").exists():
            yield from Facts(file, kind).told(rule)


def main() -> int:
    """Print the faults of all files; 1 if there is any."""
    sets = sorted((papers.MODELS.parent / "data").glob("*_sets.yaml"))
    files = [Facts(papers.MODELS / "parameters.yaml", "parameters"), *(Facts(file, "sets") for file in sets)]
    found = [line for file in files for line in file.told()]
    if not found:  # the package reads these when it is imported
        found = [line for slug in papers.slugs() for line in check_paper(papers.MODELS / slug)]
    if not found and not (ROOT / "CITATION.cff").read_text(encoding="utf-8").endswith(notebooks.references()):
        found = [f"{ROOT / 'CITATION.cff'}: references: not those of the papers; accepted: as `make notebooks` writes"]
    print("\n".join(found) or f"the facts of {len(papers.slugs())} papers are right")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
