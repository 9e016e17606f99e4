"""Check an installed wheel against the checkout that it was built from: `check_wheel.py CHECKOUT`, run elsewhere.

Every file of `lib/companion` in git must be installed, the core modules must import without the extras, and the ten
papers' facts and the toy encoders' weights must load.
"""

import importlib
import subprocess
import sys
from pathlib import Path

import safetensors.torch

import companion
from companion.io import papers

checkout, installed = Path(sys.argv[1]).resolve(), Path(companion.__file__).resolve().parent
if installed.is_relative_to(checkout):
    sys.exit(f"companion was imported from the checkout: {installed}")
listed = subprocess.run(
    ["git", "ls-files", "lib/companion"], cwd=checkout, capture_output=True, text=True, check=True
).stdout.split()
missing = [name for name in listed if not (installed / Path(name).relative_to("lib/companion")).is_file()]
if missing or not listed:
    sys.exit(f"not in the wheel: {missing or 'everything'}")
for name in ("backbones", "cli", "data", "evaluation.claims", "ops.report", "toy.encoders", "training.fit", "viz"):
    importlib.import_module(f"companion.{name}")
for slug in papers.slugs():
    importlib.import_module(f"companion.models.{slug}")
    print(f"{slug}: {papers.paper(slug)['title']}")
for file in sorted((installed / "toy" / "encoders" / "weights").glob("*.safetensors")):
    print(f"{file.name}: {len(safetensors.torch.load_file(file))} tensors")
print(f"companion {companion.__version__}: {len(listed)} files installed in {installed}")
