"""Import rules of the package, those of "How it is laid out" in the README."""

import ast
from collections.abc import Iterator
from pathlib import Path

import companion

PACKAGE = Path(companion.__file__).parent
PAPERS = {path.parent.name for path in PACKAGE.glob("models/*/paper.yaml")}


def imports(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield line and dotted name, split and without `companion`, of all that `path` imports from the package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = path.relative_to(PACKAGE.parent).parts[: -node.level] if node.level else ()
            names = [".".join((*base, *filter(None, [node.module]), alias.name)) for alias in node.names]
        else:
            continue
        assert not any(name.split(".")[0] in ("tests", "tools") for name in names), f"{path}: no test, no tool"
        yield from ((node.lineno, name.split(".")[1:]) for name in names if name.split(".")[0] == "companion")


def broken_rule(importer: tuple[str, ...], imported: list[str]) -> str:
    """The rule that forbids this import; "" when it is allowed."""
    if importer[0] != "toy" and imported[:1] == ["toy"]:
        return "only toy, notebooks, tests and benchmarks import toy"
    if imported[:1] != ["models"]:
        return ""
    if importer[0] in ("data", "evaluation", "training", "viz"):
        return f"{importer[0]} imports no model"
    if importer[0] == "models" and len(imported) > 1 and imported[1] in PAPERS - {importer[1]}:
        return "a paper imports no other paper, and models/layers imports none"
    return ""


def test_imports_follow_the_rules() -> None:
    assert len(PAPERS) == 10
    broken = []
    for path in sorted(PACKAGE.rglob("*.py")):
        importer = path.relative_to(PACKAGE).with_suffix("").parts
        for line, imported in imports(path):
            if rule := broken_rule(importer, imported):
                broken.append(f"{path.relative_to(PACKAGE)}:{line} imports {'.'.join(imported)}: {rule}")
    assert not broken, "\n".join(["", *broken])
