"""Import rules of the package, those of "How it is laid out" in the README."""

import re

from companion.ops.provenance import PACKAGE, direct_imports

PAPERS = {path.parent.name for path in PACKAGE.glob("models/*/paper.yaml")}


def broken_rule(importer: tuple[str, ...], imported: tuple[str, ...]) -> str:
    """The rule that forbids this import; "" when it is allowed."""
    if importer[0] != "toy" and imported[0] == "toy":
        return "only toy, notebooks, tests and benchmarks import toy"
    if imported[0] != "models":
        return ""
    if importer[0] in ("data", "evaluation", "training", "viz"):
        return f"{importer[0]} imports no model"
    if importer[0] == "models" and imported[1] in PAPERS - {importer[1]}:
        return "a paper imports no other paper, and models/layers imports none"
    return ""


def test_imports_follow_the_rules() -> None:
    assert len(PAPERS) == 10
    broken = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if re.search(r"(?m)^\s*(from|import) (tests|tools)\b", text):
            broken.append(f"{path}: no test, no tool")
        for file in direct_imports(path, text):
            importer, imported = (each.relative_to(PACKAGE).parts for each in (path, file))
            if rule := broken_rule(importer, imported):
                broken.append(f"{'/'.join(importer)} imports {'/'.join(imported)}: {rule}")
    assert not broken, "\n".join(["", *broken])
    assert "toy" in broken_rule(("viz", "plots.py"), ("toy", "bat.py"))
    assert "no other paper" in broken_rule(("models", "bat", "model.py"), ("models", "tip", "model.py"))
