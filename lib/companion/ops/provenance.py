"""The source files of a notebook or a module, and a hash over them.

The Snakefile uses it to find the inputs of each notebook, so that a change in one model file reruns only the notebooks
that use it; a study stores the hash, so that a report can state that the study is older than its code. Only the
standard library is used, and imports are found without importing, so that the Snakefile loads fast.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import json
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def sources(path: str | Path, package: Path = PACKAGE) -> list[Path]:
    """The files of the package that `path`, a notebook or a Python file, depends on, sorted.

    These are all modules that it imports, directly or indirectly, with their packages' `__init__.py` files; the toy
    weights and the data files (YAML, CSV, text) named in any of these files; and, for a notebook, the
    `paper.yaml` and `findings.yaml` of `models/<slug>`, its name. A file below `package` is included itself; a notebook
    is not.

    Imports are read from the source (including functions). Names composed at run time are not found. `companion.save`
    and the other functions of the package itself count where they are named.

    Raises `SyntaxError` naming the file, or the cell of a notebook, that is not Python.
    """
    path, package = Path(path).resolve(), Path(package).resolve()
    found: set[Path] = set()
    queue = [path]
    if path.is_relative_to(package):
        queue += _files(".".join((package.name, *path.relative_to(package).with_suffix("").parts)), package)
        found.update(queue)
    while queue:
        for module in _imports(queue.pop(), package):
            if module not in found:
                found.add(module)
                queue.append(module)
    texts = [file.read_text(encoding="utf-8") for file in {path, *found}]
    weights = (package / "toy" / "encoders" / "weights").glob("*")
    shipped = [(file, file.stem) for file in weights if file.suffix != ".md"]  # a model card changes no result
    shipped += [(file, file.name) for folder in ("data", "toy") for file in (package / folder).glob("*.[yct]*")]
    found.update(file for file, name in shipped if any(name in text for text in texts))
    if path.suffix == ".ipynb":
        facts = (package / "models" / path.stem / name for name in ("paper.yaml", "findings.yaml"))
        found.update(file for file in facts if file.exists())
    return sorted(found)


def code_hash(paths: Iterable[str | Path]) -> str:
    """SHA-256 over the code of `paths`, independent of the checkout's location.

    Comments, docstrings and blank lines of Python files and notebooks' code cells are ignored, as are a notebook's
    prose and outputs: correcting a sentence does not make an hour of results stale. All other files are hashed byte by
    byte.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(p).resolve() for p in paths):
        name = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else path.name
        if path.suffix in (".py", ".ipynb"):
            content = "\n".join(_bare(text) for text in _code(path)).encode()
        else:
            content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _code(path: Path) -> list[str]:
    """The text of a Python file, or of a notebook's code cells with its magics (`%`, `!`, `?`) turned into comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return [text]
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return [re.sub(r"(?m)^(\s*)([%!?].*)$", r"\1pass  # \2", "".join(cell["source"])) for cell in cells]


def _imports(path: Path, package: Path) -> Iterator[Path]:
    """The files of `package` that importing or running `path` executes directly, and those of the functions of the
    package itself that it names, which are imported on first access."""
    for number, text in enumerate(_code(path), 1):
        where = f"{path}, code cell {number}" if path.suffix == ".ipynb" else str(path)
        for name in _names(text, where, path, package):
            yield from _files(_lazy(package).get(name, name), package)


@functools.cache  # the notebooks and studies share most of their files
def _names(text: str, where: str, path: Path, package: Path) -> list[str]:
    """Full names of the modules that `text`, of the file `path`, imports, and `a.b` where it stands in an expression;
    some of them are no modules."""
    found: dict[str, None] = {}
    for node in _executed(ast.parse(text, filename=where)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, path, package)
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]  # a name may be a module
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"]
        else:
            continue
        found.update(dict.fromkeys(names))
    return list(found)


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those below `if TYPE_CHECKING`, which only a type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not _for_types(child):
            yield from _executed(child)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@functools.cache
def _lazy(package: Path) -> dict[str, str]:
    """The functions that the package imports on first access, as `__init__.py` states them for type checkers: full
    name -> name of its module."""
    path = package / "__init__.py"
    found = {}
    for block in filter(_for_types, ast.parse(path.read_text(encoding="utf-8")).body):
        for node in ast.walk(block):
            if isinstance(node, ast.ImportFrom):
                module = _absolute(node, path, package)
                found.update({f"{package.name}.{alias.name}": module for alias in node.names})
    return found


def _absolute(node: ast.ImportFrom, path: Path, package: Path) -> str:
    """The full name of the module that `from ... import` names; `level` is the number of leading dots."""
    if not node.level:
        return node.module or ""
    parts = (package.name, *path.parent.relative_to(package).parts)
    parts = parts[: len(parts) - node.level + 1]
    return ".".join((*parts, node.module) if node.module else parts)


def _files(name: str, package: Path) -> Iterator[Path]:
    """Importing `a.b.c` executes `a/__init__.py`, `a/b/__init__.py` and `a/b/c.py`: those that exist below
    `package`."""
    first, *rest = name.split(".")
    if first != package.name:
        return
    place = package
    for part in (None, *rest):
        place = place / part if part else place
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if file.is_file() and file.is_relative_to(package):
                yield file


@functools.cache
def _bare(text: str) -> str:
    """Python text without comments, docstrings and blank lines."""
    tree = ast.parse(text)
    lines = text.encode().splitlines()  # ast counts columns in bytes
    docstrings = [
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and ast.get_docstring(node, clean=False) is not None
        and isinstance(node.body[0], ast.Expr)
    ]
    for string in docstrings:
        first, last = string.lineno - 1, (string.end_lineno or string.lineno) - 1
        head, tail = lines[first][: string.col_offset], lines[last][string.end_col_offset :]
        lines[first : last + 1] = [head + tail] + [b""] * (last - first)
    bare = [line.decode() for line in lines]
    for token in tokenize.generate_tokens(io.StringIO("\n".join(bare) + "\n").readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            bare[row - 1] = bare[row - 1][:column]
    return "\n".join(line.rstrip() for line in bare if line.strip())
