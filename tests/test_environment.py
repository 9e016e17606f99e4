"""The dependencies and their lock agree, and the citation file is valid."""

import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from companion import __version__
from companion.io.papers import paper, slugs


@pytest.fixture
def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def locked(root: Path) -> dict[str, str]:
    lines = (root / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def needed(project: dict) -> list[Requirement]:
    texts = project["dependencies"] + [
        text for name, extra in project["optional-dependencies"].items() if name != "all" for text in extra
    ]
    return [Requirement(text) for text in texts]


def test_all_names_every_extra_and_conda_installs_it(root: Path, project: dict) -> None:
    extras = project["optional-dependencies"]
    (everything,) = map(Requirement, extras["all"])
    assert everything.extras == set(extras) - {"all"}
    *conda, last = yaml.safe_load((root / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    assert conda == ["python" + project["requires-python"], "pip"] and "--editable .[all]" in last["pip"]


def test_lock_pins_every_dependency_but_torch(project: dict, locked: dict[str, str]) -> None:
    wanted = {canonicalize_name(requirement.name): requirement for requirement in needed(project)}
    assert set(wanted) - set(locked) == {"torch", "torchvision"}
    assert not [name for name in locked if re.match(r"torch$|torchvision$|nvidia-|cuda-|triton", name)]
    for name in set(wanted) & set(locked):
        assert locked[name] in wanted[name].specifier, f"{name}: the lock has {locked[name]}, run `make lock`"


def test_lock_is_closed(locked: dict[str, str]) -> None:
    """What a locked package requires on this platform is locked too, so that no install can pick something newer."""
    here = {canonicalize_name(each.name): each for each in distributions()}
    if other := [name for name in locked if name in here and here[name].version != locked[name]]:
        pytest.skip(f"the installed packages are not the locked ones, for instance {other[0]}")
    for name in locked.keys() & here.keys():  # some are needed on other platforms
        for text in here[name].requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert canonicalize_name(requirement.name) in {*locked, "torch", "torchvision"}, f"{name} needs {text}"


def test_citation_file(root: Path, project: dict) -> None:
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == __version__
    assert citation["license"] == project["license"]
    assert citation["authors"] and citation["title"] and citation["message"]
    cited = {reference["identifiers"][0]["value"] for reference in citation["references"]}
    assert cited == {f"arXiv:{paper(slug)['arxiv']}" for slug in slugs()}
