"""Prose of the package, its documentation and the notebooks uses the field's words: `language.yaml` lists them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
FACTS = yaml.safe_load(Path(__file__).with_name("language.yaml").read_text(encoding="utf-8"))
WORD = re.compile(rf"(?<![\w.-])(?:{'|'.join(FACTS['words'])})(?![\w-])", re.I)
# not prose: code, addresses, paths, formatted values, names of arguments, quoted keys
CODE = r"`[^`]*`|(?<!\S)\S*/\S*|\w+\.(?:csv|ya?ml|py|md)\b|\{[^{}]*\}|(?m:^) *\w+(?:, \w+)*:(?=\s)|\"[\w-]+\""
PASSED = re.compile("|".join([CODE, *(pattern.replace(" ", r"\s+") for pattern in FACTS["allowed"])]), re.I)


def python(text: str) -> Iterator[tuple[int, str]]:
    """Strings with a space, and comments."""
    lines, nodes = text.encode().splitlines(), list(ast.walk(ast.parse(text)))
    inner = {child for n in nodes if isinstance(n, ast.JoinedStr) for child in ast.walk(n) if child is not n}
    texts = [n for n in nodes if isinstance(n, (ast.Constant, ast.JoinedStr)) and n not in inner]
    for node in (text for text in texts if isinstance(getattr(text, "value", ""), str)):
        first, last = node.lineno - 1, (node.end_lineno or 0) - 1
        start, end = node.col_offset, node.end_col_offset or 0
        part = lines[first : last + 1]
        part[-1] = part[-1][:end]
        part[0] = part[0][start:]
        lines[last] = b" " * end + lines[last][end:] if last > first else lines[last]  # what is left are comments
        lines[first] = lines[first][:start] + (b" " * (end - start) + lines[first][end:] if last == first else b"")
        lines[first + 1 : last] = [b""] * (last - first - 1)
        found = b"\n".join(part).decode()
        if " " in found:
            yield first + 1, found
    yield from ((n, line[line.index(b"#") :].decode()) for n, line in enumerate(lines, 1) if b"#" in line)


def prose(text: str, suffix: str) -> Iterator[tuple[int, str]]:
    """The prose of a file in parts, each with its first line."""
    if suffix == ".py":
        yield from python(text)
    elif suffix == ".yaml":
        for item in yaml.scan(text, Loader=getattr(yaml, "CLoader", yaml.Loader)):
            if isinstance(item, yaml.ScalarToken) and " " in item.value:
                yield item.start_mark.line + 1, item.value
        yield from ((n, line) for n, line in enumerate(text.splitlines(), 1) if line.lstrip().startswith("#"))
    else:
        yield 1, re.sub(r"(?ms)^```.*?^```", lambda block: "\n" * block[0].count("\n"), text)


def found(text: str, name: str) -> list[str]:
    """The words in a file's text, as "file:line: word, write ..."; of a notebook its cells, numbered from 1."""
    hits: list[str] = []
    if name.endswith(".ipynb"):
        for n, cell in enumerate(json.loads(text)["cells"], 1):
            source = re.sub(r"(?m)^(\s*)[%!?].*$", r"\1pass", "".join(cell["source"]))
            hits += found(source, f"{name}, cell {n}{'.py' if cell['cell_type'] == 'code' else '.md'}")
        return hits
    if not WORD.search(PASSED.sub(" ", text)):
        return hits
    for line, part in prose(text, Path(name).suffix):
        part = PASSED.sub(lambda match: "_" + "\n" * match[0].count("\n"), part)
        for match in WORD.finditer(part):
            wanted = next(word for pattern, word in FACTS["words"].items() if re.fullmatch(pattern, match[0], re.I))
            hits.append(f"{name}:{line + part.count(chr(10), 0, match.start())}: {match[0]!r}, write {wanted!r}")
    return hits


def read(name: str) -> list[str]:
    return found((ROOT / name).read_text(encoding="utf-8"), name)


def test_files_use_the_fields_words() -> None:
    folders = [ROOT / folder for folder in ("lib", "benchmarks", "site", "notebooks", "profiles")]
    paths = [*ROOT.glob("*.md"), *(path for folder in folders for path in folder.rglob("*.*"))]
    names = [str(path.relative_to(ROOT)) for path in paths if path.suffix in (".py", ".yaml", ".md", ".ipynb")]
    hits = [hit for name in names for hit in read(name)]
    assert len(names) > 200 and not hits, "\n".join(hits)


def test_a_planted_word_is_found() -> None:
    text = '"""Says so.\n\nIt tells."""\n\nx = 1  # a knob\ny = f"{x} pictures"\nplace = "kept"\n'
    says = [f"a.py:{n}: {word!r}, write 'predict, output, return, state'" for n, word in ((1, "Says"), (3, "tells"))]
    knob = "a.py:5: 'knob', write 'control, slider'"
    assert found(text, "a.py") == [*says, "a.py:6: 'pictures', write 'image'", knob]
    floor, rate = "b.yaml:1: 'floor', write 'baseline, lower bound'", "b.yaml:2: 'rate', write 'learning rate'"
    assert found("# a floor\nrate: {x: at a low rate}\n", "b.yaml") == [rate, floor]
    beside = "c.md:3: 'beside', write 'next to, compared with'"
    assert found("\n`rate`, [a](place/cut.md) is\nbeside\n```\nslot\n```\n", "c.md") == [beside]
    sources = {"markdown": ["# One\n", "a slot"], "code": ["%pip\n", "'a cut'"]}
    cells = [{"cell_type": kind, "source": source} for kind, source in sources.items()]
    hits = found(json.dumps({"cells": cells}), "d.ipynb")
    assert [hit.split(",")[1] for hit in hits] == [" cell 1.md:2: 'slot'", " cell 2.py:2: 'cut'"]
    assert not found("learning\nrates, model cards, standard deviations, trained in place\n", "e.md")
