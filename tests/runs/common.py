"""A small checkout, and archives of runs that nobody made, with the published sizes: whoever knows the checks can write
such a one."""

import hashlib
import json
import zipfile
from pathlib import Path

import pandas as pd

from companion.data import DATASETS, spaced
from companion.io.provenance import code_hash, sources
from companion.runs.archives import ROWS
from tests.conftest import ROOT


def small_checkout(folder: Path) -> Path:
    """A checkout in small: the notebook, and what it is recognised by."""
    (folder / "notebooks").mkdir(parents=True)
    (folder / "lib" / "companion").mkdir(parents=True)
    (folder / "pyproject.toml").write_text("")
    (folder / "notebooks" / "sa2vp.ipynb").write_bytes((ROOT / "notebooks" / "sa2vp.ipynb").read_bytes())
    return folder


def archive(file: Path, *, by: str, device: str, seed: int, accuracy: float) -> None:
    """A row of SA²VP on SVHN."""
    notebook = ROOT / "notebooks" / "sa2vp.ipynb"
    sizes = {split: {"items": n, "labels": [n // 2, n - n // 2]} for split, n in DATASETS["vtab/svhn"].sizes.items()}
    row = {"method": "SA²VP", "backbone": "vit_b16", "dataset": "vtab/svhn", "seed": seed}
    steps = 100 * 1000 // 64
    history = pd.DataFrame({"step": spaced(steps, ROWS), "lr": 0.1, "loss": 1.0})
    measured = pd.DataFrame([row | {"accuracy": accuracy}])
    files = {"measured.csv": measured.to_csv(index=False), "history/0.csv": history.to_csv(index=False)}
    facts = {"slug": "sa2vp", "date": "2026-01-01", "version": "4", "commit": "", "versions": {}, "seconds": 3000.0}
    facts |= {"code": code_hash([notebook, *sources(notebook)]), "data": {"vtab/svhn": sizes}, "weights": {}}
    facts |= {"by": by, "device": device, "parameters": row | {"profile": "paper"}, "steps": [steps]}
    facts["files"] = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w") as packed:
        for name, text in ({"run.json": json.dumps(facts)} | files).items():
            packed.writestr(name, text)
