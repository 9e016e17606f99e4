"""Without the packages of an extra: what needs them names the extra, all else is imported and runs."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
import tomllib
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement

from companion.errors import EXTRAS, CompanionError, MissingExtra
from tests.conftest import ROOT, fresh

RUN = {"paper": "bat", "table": "lasher", "data_root": "data", "dry_run": True, "profile": "profiles/local"}
NEEDING: dict[str, list[tuple[Any, ...]]] = {
    "reports": [("cli", "run", argparse.Namespace(**RUN))],
    "tracking": [
        ("models.bat.recipe",),
        ("models.bat.crops", "crop", np.zeros((9, 9, 3), np.uint8), (2, 2, 4, 4), 2.0, 8),
        ("toy.bat",),
    ],
    "detection": [
        ("evaluation.metrics.detection",),
        ("models.dmt.recipe",),
        ("models.sic_cads.recipe",),
        ("models.sic_cads.detectors", "build", "google/owlvit-base-patch32", ["cat"]),
    ],
    "slides": [("data.pyramids", "Slide", "slide.tiff"), ("data.slides", "read_features", "slide.h5")],
    "xrays": [("models.ecamp",), ("data.decoding", "unit", "chest.dcm")],
    "landcover": [
        ("data.climate", "zone", 52.0, 13.0),
        ("data.rasters", "Raster", "area.tif"),
        ("data.xbd", "compile_xbd", "data", "xbd"),
        ("backbones", "read_bert", "bert"),
    ],
    "diffusion": [("models.tip",), ("toy.encoders.words",)],
    "real": [("packaged", "_from_onnx", "source", "target")],
}
"""What needs an extra: a module of the library; or what is in one, with arguments."""

ONLY_WITH = {"evaluation.metrics.detection", "models.bat.recipe", "models.bat.tracking", "models.dmt.recipe"}
ONLY_WITH |= {"models.ecamp", "models.sic_cads.figures", "models.sic_cads.predictions", "models.sic_cads.recipe"}
ONLY_WITH |= {"models.tip", *(f"toy.{name}" for name in ("bat", "ecamp", "figures", "sic_cads", "tip"))}
ONLY_WITH |= {"toy.encoders.texture_prior", "toy.encoders.words"}
"""Modules that are imported with an extra alone."""

CORE = ("lightning_fabric", "open_clip", "torchmetrics")
"""Import packages of extras where they are installed."""


def hide(*extras: str) -> None:
    """From now on this process has none of the packages of some extras, as if they were not installed."""
    modules = {module for extra in extras for module in EXTRAS[extra]}
    installed = packages_distributions()
    gone = {name for module in modules for name in installed.get(module, ())}

    class Without(PathFinder):
        @classmethod
        def find_spec(cls, fullname, path=None, target=None):
            return None if fullname.partition(".")[0] in modules else super().find_spec(fullname, path, target)

        @classmethod
        def find_distributions(cls, *args, **options):
            return (found for found in super().find_distributions(*args, **options) if found.name not in gone)

    sys.meta_path[sys.meta_path.index(PathFinder)] = Without
    for module in [*sys.modules]:
        if module.partition(".")[0] in modules.union(CORE):
            del sys.modules[module]


def asked(extra: str, folder: Path) -> dict[str, str]:
    """What `NEEDING` says of an extra, without it: the errors."""
    hide(extra)
    os.chdir(folder)
    Path("chest.dcm").touch()
    found = {}
    for module, *call in NEEDING[extra]:
        with pytest.raises(CompanionError) as error:
            imported = importlib.import_module(f"companion.{module}")
            getattr(imported, call[0])(*call[1:])
        found[module] = str(error.value)
    return found


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_needs_an_extra_names_it(extra, tmp_path):
    found = fresh(asked, extra, tmp_path)
    assert found and not {name: text for name, text in found.items() if f"[{extra}]" not in text}


def minimal(folder: Path) -> list[str]:
    """Modules of the library that cannot be imported without any extra, after commands that need none."""
    hide(*EXTRAS)
    import companion
    from companion import cli
    from companion.io.papers import slugs

    assert cli.main(["data", "--data-root", str(folder)]) == 0
    for slug in slugs():
        assert cli.main(["doctor", slug, "--data-root", str(folder)]) == 1  # data are missing, and listed
    found = []
    for module in pkgutil.walk_packages(companion.__path__, "companion.", onerror=lambda _: None):
        try:
            importlib.import_module(module.name)
        except MissingExtra:
            found.append(module.name.removeprefix("companion."))
    return found


def test_all_else_is_there_without_any_extra(tmp_path):
    assert {*fresh(minimal, tmp_path)} <= ONLY_WITH


def test_the_modules_of_an_extra_are_of_its_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = packages_distributions()
    for extra, modules in EXTRAS.items():
        packages = {Requirement(text).name for text in project["optional-dependencies"][extra]}
        for module in modules:
            if found := installed.get(module):
                assert packages & {*found}, f"{module} is not of the extra {extra}"
