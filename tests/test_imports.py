"""Import rules of the package, those of "How the project is laid out" on the site."""

import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from companion.io.provenance import PACKAGE, direct_imports

PAPERS = {path.parent.name for path in PACKAGE.glob("models/*/paper.yaml")}
ORDER = ["errors", "io", "packaged", "backbones", "data", "training", "evaluation", "viz"]
ORDER += ["saving", "models", "toy", "studies", "runs", "cli"]
"""Folders and modules of the package: each imports those before it, and itself."""


def name(path: Path) -> tuple[str, ...]:
    """The module of a file, below the package."""
    return path.relative_to(PACKAGE).with_suffix("").parts


def broken_rule(importer: tuple[str, ...], imported: tuple[str, ...]) -> str:
    """The rule that forbids this import; "" when it is allowed."""
    if "__init__" in (importer[0], imported[0]):
        return ""  # the package itself imports when a name is asked for
    if ORDER.index(importer[0]) < ORDER.index(imported[0]):
        return f"{importer[0]} is below {imported[0]}"
    if imported[0] == "toy" and importer[0] not in ("toy", "studies"):
        return "only toy, studies, notebooks, tests and benchmarks import toy"
    if importer[:1] == imported[:1] == ("models",) and imported[1] in PAPERS - {importer[1]}:
        return "a paper imports no other paper, and models/layers imports none"
    return ""


def test_each_paper_has_one_shape_and_what_several_share_is_shared() -> None:
    """`official` is missing where there is no code of the authors."""
    for slug in PAPERS:
        found = {path.stem for path in (PACKAGE / "models" / slug).glob("*.py")}
        assert found >= {"model", "recipe", "figures"} and (slug == "tip" or "official" in found), slug
    layers = {path.stem: set[str]() for path in (PACKAGE / "models/layers").glob("[!_]*.py")}
    for path in PACKAGE.glob("models/*/*.py"):
        for file in direct_imports(path, path.read_text(encoding="utf-8")):
            if file.parent.name == "layers" and file.stem in layers:
                layers[file.stem].add(path.parent.name)
    alone = {module: by for module, by in layers.items() if len(by - {"layers"}) < 2}
    assert not alone


def test_imports_follow_the_rules() -> None:
    broken, imports = [], {}
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if re.search(r"(?m)^\s*(from|import) (tests|tools)\b", text):
            broken.append(f"{path}: no test, no tool")
        found = {file for file in direct_imports(path, text) if file.name != "__init__.py"}
        imports[name(path)] = {name(file) for file in found} - {name(path)}
        for imported in imports[name(path)]:
            if rule := broken_rule(name(path), imported):
                broken.append(f"{'/'.join(name(path))} imports {'/'.join(imported)}: {rule}")
    assert not broken, "\n".join(["", *broken])
    try:
        tuple(TopologicalSorter(imports).static_order())
    except CycleError as error:
        raise AssertionError(f"a circle, functions included: {error.args[1]}") from error
