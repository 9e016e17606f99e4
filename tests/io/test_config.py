"""A forged config builds nothing that reads a file, looks one up or runs code."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import pkgutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

import companion
from companion.errors import BadParameter
from companion.io import config
from tests.models.common import refuses
from tests.test_saving import MODELS, TRANSFORMS

# to which some recorded calls pass arguments on
LIBRARIES = (timm.create_model, open_clip.create_model, VisionTransformer, SwinTransformer, open_clip.CLIP)


class Trap:
    """A file that creates `touched` where it is unpickled, and a record of what is opened and looked up."""

    def __init__(self, folder: Path):
        self.file, self.touched, self.found = folder / "evil.pt", folder / "touched", list[str]()
        torch.save(self, self.file)
        (folder / "evil.py").write_text(f"open({str(self.touched)!r}, 'w')")

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.touched,)

    def audit(self, event: str, args: tuple) -> None:
        """For `sys.addaudithook`."""
        opened = event == "open" and str(args[0]).startswith(str(self.file.parent))
        if opened or event in ("os.system", "subprocess.Popen", "socket.getaddrinfo", "socket.connect"):
            self.found.append(f"{event} {args[0]}")


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trap]:
    made, armed = Trap(tmp_path_factory.mktemp("forged")), [True]
    sys.addaudithook(lambda event, args: made.audit(event, args) if armed else None)  # cannot be removed
    reach = socket.getaddrinfo
    socket.getaddrinfo = lambda host, *args, **options: made.found.append(f"looked up {host}") or reach("localhost", 0)
    yield made
    socket.getaddrinfo = reach
    armed.clear()


@functools.cache
def recorded() -> dict[str, dict[str, Any]]:
    """All that a config may name, with the arguments of a small example where there is one."""
    found: dict[str, dict[str, Any]] = {}

    def collect(note: Any) -> None:
        if isinstance(note, dict) and "by" in note:
            found.setdefault(note["by"], note["args"])
        for entry in note.values() if isinstance(note, dict) else note if isinstance(note, list) else ():
            collect(entry)

    collect([config.config_of(made()) for made in MODELS.values()])
    collect([config.config_of(made) for made, _ in TRANSFORMS.values()])
    for module in [entry.name for entry in pkgutil.walk_packages(companion.__path__, "companion.")]:
        for name in vars(importlib.import_module(module)):
            with contextlib.suppress(BadParameter):
                made = config._resolve(f"{module}:{name}")
                bases = [f"{base.__module__}:{base.__qualname__}" for base in getattr(made, "__mro__", ())]
                found.setdefault(f"{module}:{name}", next((found[base] for base in bases if base in found), {}))
    return found | {config.VIT: {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 3}}


def accepted(by: str) -> set[str]:
    """The names of all arguments that a constructor, those that it extends, or a library behind it, take."""
    target = config._resolve(by)
    bases = [base for base in getattr(target, "__mro__", ()) if base.__module__.startswith(("companion", "timm"))]
    calls = [target, *(base for base in bases if "__init__" in vars(base))]
    calls += LIBRARIES if by in config.PASSED_ON else ()
    known = config.SIZES if by in config.PASSED_ON else set()
    return known | {name for call in calls for name in inspect.signature(call).parameters}


@pytest.mark.parametrize("made", [config.PASSED_ON, pytest.param(None, marks=pytest.mark.slow, id="all")])
def test_no_argument_of_a_forged_config_is_read_or_looked_up_or_run(made: set[str] | None, trap: Trap) -> None:
    sources = {"file": str(trap.file), "hf_model_name": "evil/model", "url": "https://evil.invalid/model.pt"}
    sources |= {"timm_model_name": "resnet18", "timm_model_pretrained": True, "custom_load": True}
    flags = {"weights_only": False, "trust_remote_code": True}  # they would let an unpickler run
    towers = dict.fromkeys(config.TOWER, str(trap.file))
    values = [str(trap.file), "hf-hub:evil/model", "laion2b_s34b_b79k"]
    values += [{"mapping": [*map(list, found.items())]} for found in (sources, towers)]
    examples = recorded()
    for by, example in [(by, examples[by]) for by in made or examples]:
        flagged = [{}, flags, flags | {"pretrained": str(trap.file)}] if by in config.PASSED_ON else [{}]
        for args in [{name: value} | more for name in accepted(by) for value in values for more in flagged]:
            try:
                config.rebuild({"by": by, "args": example | args})
            except Exception as error:
                assert not isinstance(error, OSError), (by, args)
            assert not trap.found and not trap.touched.exists(), (by, args, trap.found)


def test_the_trap_closes(trap: Trap) -> None:
    torch.load(trap.file, weights_only=False)
    with contextlib.suppress(OSError):
        socket.create_connection(("evil.invalid", 80), timeout=1)
    assert trap.touched.exists() and trap.found[0] == f"open {trap.file}" and "looked up evil.invalid" in trap.found
    trap.touched.unlink()
    trap.found.clear()


@pytest.mark.parametrize("name", ["openclip:roberta-ViT-B-32/", "openclip:hf-hub:evil/model", "local-dir:/tmp"])
def test_an_encoder_of_another_source_is_refused(name: str, trap: Trap) -> None:
    refuses((lambda: config.rebuild({"by": "companion.backbones:build", "args": {"name": name}}), "name"))
    assert not trap.found
