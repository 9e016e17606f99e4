"""The source files of a notebook or a module, and a hash over them.

The Snakefile uses it to find the inputs of each notebook, so that a change in one model file reruns only the notebooks
that use it; a study stores the hash, so that a report can state that the study is older than its code. Only the
standard library is used, and imports are found without importing, so that the Snakefile loads fast.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]


def sources(path: str | Path, package: Path = PACKAGE) -> list[Path]:
    """The files of the package that `path`, a notebook or a Python file, depends on, sorted.

    These are all modules that it imports, directly or indirectly, with their packages' `__init__.py` files; the toy
    weights and the data files (YAML, CSV, text) named in any of these files; and, for a notebook, the `paper.yaml`,
    `findings.yaml` and `threads.yaml` of `models/<slug>`, its name. A file below `package` is included itself; a
    notebook is not.

    Imports within functions count; names composed at run time are not found. `companion.save` and the other functions
    of the package itself count where they are named.
    """
    path, package = Path(path).resolve(), Path(package).resolve()
    queue, found, texts = [path], {path}, []
    while queue:
        file = queue.pop()
        texts.append(_code(file))
        new = set(direct_imports(file, texts[-1], package)) - found
        found |= new
        queue += new
    weights = (package / "toy" / "encoders" / "weights").glob("*")
    shipped = [(file, file.stem) for file in weights if file.suffix != ".md"]  # a model card changes no result
    shipped += [(file, file.name) for folder in ("data", "toy") for file in (package / folder).glob("*.[yct]*")]
    found.update(file for file, name in shipped if any(name in text for text in texts))
    if path.suffix == ".ipynb":
        facts = (package / "models" / path.stem / name for name in ("paper.yaml", "findings.yaml", "threads.yaml"))
        found.update(file for file in facts if file.exists())
    return sorted(file for file in found if file.is_relative_to(package))


def code_hash(paths: Iterable[Path]) -> str:
    """SHA-256 over the code of files of `sources` (or next to the package), independent of the checkout's location.

    Comments, docstrings and the layout of Python files are ignored: correcting a sentence does not make an hour of
    results stale. All other files are hashed byte by byte.
    """
    digest = hashlib.sha256()
    # a benchmark is last, wherever the package is installed
    for path in sorted(map(Path.resolve, paths), key=lambda path: (not path.is_relative_to(PACKAGE), path)):
        name = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else path.name
        content = _meaning(_code(path), str(path)) if path.suffix == ".py" else path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _code(path: Path) -> str:
    """The text of a Python file, or of a notebook's code cells without their magics (`%`, `!`, `?`)."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return re.sub(r"(?m)^(\s*)[%!?].*$", r"\1pass", "\n".join(cells))


def direct_imports(path: Path, text: str, package: Path = PACKAGE) -> Iterator[Path]:
    """The files of `package` that importing or running `path` executes directly, and those of the functions of the
    package itself that it names, which are imported on first access."""
    here = ".".join((package.name, *path.parent.relative_to(package).parts)) if path.is_relative_to(package) else ""
    # as `__init__.py` states them for type checkers
    first = ast.walk(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
    lazy = {x.name: f"{node.module}." for node in first if isinstance(node, ast.ImportFrom) for x in node.names}
    for name in (here, *_named(text, here, package.name)):
        top, *parts = name.split(".")
        parts = [*lazy.get(parts[0], "").split(".")[:-1], *parts] if parts else parts
        for depth in range(len(parts) + 1) if top == package.name else ():
            place = package.joinpath(*parts[:depth])
            yield from filter(Path.is_file, (place / "__init__.py", place.with_suffix(".py")))


@functools.cache  # the notebooks share most of their files
def _named(text: str, here: str, package: str) -> list[str]:
    """What Python text in the package `here` imports, except for type checkers: modules, and names in them; and the
    attributes of the package itself that it names."""
    found, queue = list[str](), list[ast.AST]([ast.parse(text)])
    while queue:
        node: Any = queue.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = "." * getattr(node, "level", 0) + (getattr(node, "module", "") or "")
            base = resolve_name(base, here) if base else ""
            found += [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == package:
            found.append(f"{package}.{node.attr}")
        if not (isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"):
            queue += ast.iter_child_nodes(node)
    return found


@functools.cache
def _meaning(text: str, name: str) -> bytes:
    """The syntax tree of Python text as bytes, without docstrings; the same in every version of Python."""

    def bare(value: Any) -> Any:
        if isinstance(value, list):
            return [
                bare(item)
                for item in value
                if not isinstance(getattr(item, "value", None), ast.Constant) or not isinstance(item, ast.Expr)
            ]
        if isinstance(value, ast.AST):
            # what is empty may be missing in another version
            fields = [(key, bare(field)) for key, field in ast.iter_fields(value) if field not in (None, [])]
            return type(value).__name__, fields
        return value

    return repr(bare(ast.parse(text, name))).encode()
