"""python -m tools.cases FOLDER ...: convert every case of version 2 below the folders, in place."""

import json
import sys
import textwrap
from pathlib import Path

from . import FORM, parity, recipe


def text(value: object, indent: int = 0) -> str:
    """JSON in which a list or mapping is on one line where it fits; a long list of numbers fills its lines."""
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(flat) + indent < 118:
        return flat
    start, inner = "\n" + " " * (indent + 1), [
        f"{json.dumps(key, ensure_ascii=False)}: {text(entry, indent + 1)}" for key, entry in value.items()
    ] if isinstance(value, dict) else [text(entry, indent + 1) for entry in value]  # fmt: skip
    if all(isinstance(entry, int | float) for entry in value):
        return "[" + start + start.join(textwrap.wrap(flat[1:-1], 110)) + "\n" + " " * indent + "]"
    ends = "{}" if isinstance(value, dict) else "[]"
    return ends[0] + start + f",{start}".join(inner) + "\n" + " " * indent + ends[1]


for root in sys.argv[1:]:
    for path in sorted(Path(root).rglob("case.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        paper = path.parents[1].name
        if facts.get("form") == FORM:
            continue
        if (path.parent / "outputs.safetensors").exists():
            made = parity(paper, path.parent)
        elif "expected" in facts and "kind" in facts:
            made = recipe(paper, path.parent)
        else:
            continue  # facts that a test of its own reads
        path.write_text(text(made) + "\n", encoding="utf-8")
        print(path)
