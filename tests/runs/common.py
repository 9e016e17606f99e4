"""A checkout in small, and a contribution whose form is right, of a run that nobody made."""

import json
import subprocess
from pathlib import Path

import pandas as pd

from companion.io.papers import rules
from tests.conftest import ROOT


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "protocol.file.allow=always")
    return subprocess.run(
        ["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def small_checkout(folder: Path) -> Path:
    """A repository with one commit: the tools, and what a checkout is recognised by."""
    (folder / "lib" / "companion").mkdir(parents=True)
    (folder / "lib" / "companion" / "__init__.py").touch()
    (folder / "pyproject.toml").touch()
    (folder / "tools").symlink_to(ROOT / "tools")
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "base")
    return folder


def contribution(folder: Path, by: str, device: str, seed: int, accuracy: object, commit: str = "") -> None:
    """A row of SA²VP on SVHN, as `companion pack` writes it."""
    folder.mkdir(parents=True)
    row = {"method": "SA²VP", "backbone": "vit_b16", "dataset": "vtab/svhn", "seed": seed}
    usual = {"switch": False, "integer": 1, "number": 1, "text": ""}
    given = {name: usual.get(rule["type"], rule.get("choices", [""])[0]) for name, rule in rules("sa2vp").items()}
    given |= row | {"profile": "paper", "accelerator": "cuda"}
    facts = {
        "slug": "sa2vp",
        "by": by,
        "date": folder.name[:10],
        "version": "5",
        "commit": commit or "0" * 40,
        "device": device,
        "seconds": 3000.0,
        "versions": {"torch": "2.9.1"},
        "parameters": {name: value for name, value in given.items() if name not in ("data_root", "out")},
        "items": {"vtab/svhn": {"trainval": 1000, "test": 26032}},
    }
    (folder / "run.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    pd.DataFrame([row | {"accuracy": accuracy}]).to_csv(folder / "measured.csv", index=False)
    steps = pd.DataFrame({"training": 0, "step": [1, 50, 100], "lr": 0.1, "loss": [3.0, 2.0, 1.0]})
    steps.to_csv(folder / "history.csv", index=False)
