"""The environment of a run: versions, commit, device, time and memory."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import psutil
import torch

PACKAGES = "torch torchvision timm open_clip_torch lightning-fabric numpy scikit-learn scikit-image"
OPTIONAL = "transformers diffusers"  # from the extras of some papers


def root() -> Path:
    """The checkout that contains the working directory (with this package in its lib); else the one that this package
    is installed from; else the directory itself."""
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[3]):
        if (folder / "pyproject.toml").is_file() and (folder / "lib" / "companion").is_dir():
            return folder
    return here


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results."""
    found = {"python": platform.python_version()}
    for name in f"{PACKAGES} {OPTIONAL}".split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str:
    """The commit of the checkout, followed by "+changes" when files differ; "" outside of a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root(), capture_output=True, text=True, check=True).stdout.strip()

    try:
        code = ["lib", "notebooks", "pyproject.toml"]
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", *code) else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def uses_gpu() -> bool:
    """Whether this process has allocated memory on a GPU; an unused GPU is not part of a run."""
    return torch.cuda.is_initialized() and torch.cuda.max_memory_allocated() > 0


def device(accelerator: str = "auto", devices: int = 1) -> str:
    """The name and number of GPUs if any was used; otherwise the CPU's name and the number of threads.

    Several GPUs are used by separate processes: their number is in the run's parameters.
    """
    if uses_gpu() or (devices > 1 and accelerator != "cpu" and torch.cuda.is_available()):
        return torch.cuda.get_device_name() + (f" x {devices}" if devices > 1 else "")
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def peak_memory_mb() -> int:
    """Peak memory of this process so far, in MB (of the GPU, if it uses one)."""
    if uses_gpu():
        return round(torch.cuda.max_memory_allocated() / 1e6)
    if sys.platform == "win32":
        return round(psutil.Process().memory_info().peak_wset / 1e6)
    if sys.platform == "linux":  # getrusage would include the peak of the parent process
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return round(int(status.split("VmHWM:")[1].split()[0]) / 1e3)
    import resource  # not on Windows

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)  # bytes on macOS
