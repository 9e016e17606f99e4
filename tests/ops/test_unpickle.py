"""Pickles of other projects: tensors are returned, and no code from the file is run or imported."""

import io
import os
import pickle
import sys
import types
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from torch import nn

from companion.backbones import read_state
from companion.errors import CorruptFile
from companion.ops import unpickle
from companion.ops.unpickle import Inert

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class Evil:
    """Makes the folder `path` when it is unpickled the usual way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trainer():
    """A trainer's own module, gone when the file is read: as with a checkpoint of somebody else's project."""
    module = types.ModuleType("their_trainer")
    source = """
import enum
class Settings: ...
class Log(list): ...
class Table(dict): ...
class Slotted:
    __slots__ = ("value",)
class Mode(enum.Enum):
    TRAIN = 1
def build(): ...
"""
    exec(source, vars(module))
    sys.modules[module.__name__] = module
    yield module
    sys.modules.pop(module.__name__, None)


def weights() -> OrderedDict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return OrderedDict(
        weight=torch.randn(4, 3, generator=generator),
        half=torch.randn(5, generator=generator).half(),
        brain=torch.randn(5, generator=generator).bfloat16(),
        count=torch.tensor(7),
        mask=torch.tensor([True, False]),
        parameter=nn.Parameter(torch.randn(2, 2, generator=generator)),
        view=torch.arange(12.0).view(3, 4).T[1:],
    )


def same(found, expected) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@FORMATS
def test_a_checkpoint_with_foreign_objects_gives_its_tensors(tmp_path, trainer, zipped, recwarn):
    settings, log, table, slotted = trainer.Settings(), trainer.Log([1, 2]), trainer.Table(a=1), trainer.Slotted()
    settings.lr, settings.nested, slotted.value = 1e-4, trainer.Settings(), 3
    path = tmp_path / "checkpoint.pth.tar"
    foreign = {"settings": settings, "log": log, "table": table, "slotted": slotted, "mode": trainer.Mode.TRAIN}
    foreign["network"] = nn.Linear(2, 2)
    held = {"epoch": 300, "net": weights(), "stats": defaultdict(list, loss=[0.5]), "build": trainer.build}
    torch.save(held | {"keys": {settings: 1}} | foreign, path, _use_new_zipfile_serialization=zipped)
    del sys.modules["their_trainer"]
    found = unpickle.load_torch(path)
    assert found["epoch"] == 300 and found["stats"]["loss"] == [0.5]
    same(found["net"], weights())
    assert isinstance(found["net"]["parameter"], nn.Parameter)
    for name in foreign:
        assert type(found[name]) is Inert, name
    assert found["build"] is Inert and [type(key) for key in found["keys"]] == [Inert]
    assert "their_trainer" not in sys.modules and not recwarn.list


@FORMATS
def test_tensors_land_on_the_cpu_and_share_their_storage_as_saved(tmp_path, zipped):
    base = torch.arange(6.0)
    torch.save({"a": base, "b": base[2:]}, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    found = unpickle.load_torch(tmp_path / "c.pt")
    found["a"][2] = -1
    assert found["b"].tolist() == [-1, 3, 4, 5]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_gives_numpy_arrays_and_containers(tmp_path, protocol):
    held = {
        "float": np.linspace(0, 1, 7).reshape(1, 7),
        "int": np.arange(6, dtype=np.int16).reshape(2, 3).T,
        "text": np.array(["a", "bcd"]),
        "fields": np.array([(1, 2.5)], dtype=[("n", "i4"), ("x", "f8")]),
        "scalar": np.float32(0.25),
        "plain": [1, (2.5, None), {"a", "b"}, frozenset({3}), b"raw", 1 + 2j, bytearray(b"x"), slice(1, 2)],
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(held, protocol))
    found = unpickle.load(tmp_path / "a.pkl")
    assert found.keys() == held.keys()
    assert found["plain"] == held["plain"] and found["scalar"] == 0.25
    for name in ("float", "int", "text", "fields"):
        assert found[name].dtype == held[name].dtype
        np.testing.assert_array_equal(found[name], held[name])


def test_arrays_written_by_numpy_1_load_without_a_warning(tmp_path, recwarn):
    """Their module was called numpy.core then."""
    text = pickle.dumps(np.arange(3.0), 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core" in text
    (tmp_path / "a.pkl").write_bytes(text)
    assert unpickle.load(tmp_path / "a.pkl").tolist() == [0, 1, 2]
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_code_in_a_file_does_not_run(tmp_path, kind):
    path, held = tmp_path / "c.pt", {"evil": Evil(tmp_path / "made"), "n": 1}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(held))
    else:
        torch.save(held, path, _use_new_zipfile_serialization=kind == "zip")
    found = unpickle.load(path) if kind == "pickle" else unpickle.load_torch(path)
    assert not held["evil"].path.exists() and type(found["evil"]) is Inert and found["n"] == 1
    pickle.loads(path.read_bytes()) if kind == "pickle" else torch.load(path, weights_only=False)
    assert held["evil"].path.exists(), "the trap is not live"


REACHING = """
builtins:eval __builtin__:eval builtins:getattr builtins:__import__ os:system posix:system operator:attrgetter
functools:partial numpy:load torch:load torch.hub:load companion.ops.unpickle:load
"""


@pytest.mark.parametrize("name", REACHING.split())
def test_functions_that_reach_further_are_not_given(tmp_path, name):
    (tmp_path / "a.pkl").write_text("c" + name.replace(":", "\n") + "\n.")
    assert unpickle.load(tmp_path / "a.pkl") is Inert


def test_dotted_names_do_not_lead_out_of_the_list(tmp_path):
    """Protocol 4 walks attributes: torch.Size.__init__.__globals__ would be a way to everything."""
    for name in ("Size.__new__", "serialization.os.systemStorage", "storage.sys.modules"):
        words = [pickle.SHORT_BINUNICODE + bytes([len(s)]) + s.encode() for s in ("torch", name)]
        (tmp_path / "a.pkl").write_bytes(pickle.PROTO + b"\x04" + b"".join(words) + pickle.STACK_GLOBAL + b".")
        assert unpickle.load(tmp_path / "a.pkl") is Inert


def test_no_module_is_imported(tmp_path, monkeypatch):
    (tmp_path / "trap_module.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'made')!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a.pkl").write_bytes(b"ctrap_module\nThing\n)R.")
    assert type(unpickle.load(tmp_path / "a.pkl")) is Inert
    assert "trap_module" not in sys.modules and not (tmp_path / "made").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_torchscript_program_is_refused(tmp_path, monkeypatch):
    """torch.load would hand it to torch.jit.load, which runs what the program does when it is loaded."""

    class Program(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("the program was loaded"))
    path = tmp_path / "program.pt"
    torch.jit.trace(Program(), torch.zeros(1)).save(str(path))
    for read in (unpickle.load_torch, read_state):
        with pytest.raises(CorruptFile, match="TorchScript") as caught:
            read(path)
        assert caught.value.path == path


@FORMATS
@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_a_truncated_checkpoint_is_named(tmp_path, zipped, share):
    path = tmp_path / "c.pt"
    torch.save({"net": {"w": torch.randn(500)}}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    for read in (unpickle.load_torch, read_state):
        with pytest.raises(CorruptFile, match=r"c\.pt: not a file of torch\.save") as caught:
            read(path)
        assert caught.value.path == path


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"<html>quota</html>", bytes(range(256)), None, "folder"])
def test_files_that_are_something_else_or_missing(tmp_path, content):
    path = tmp_path if content == "folder" else tmp_path / "a.pkl"
    if isinstance(content, bytes):
        path.write_bytes(content)
    for read in (unpickle.load, unpickle.load_torch, read_state):
        with pytest.raises(CorruptFile) as caught:
            read(path)
        assert caught.value.path == path and str(path) in str(caught.value)


@FORMATS
@pytest.mark.parametrize("entry", ["net", "state_dict", "model", None])
def test_read_state_finds_the_weights(tmp_path, trainer, entry, zipped):
    held = weights() if entry is None else {entry: weights(), "settings": trainer.Settings(), "epoch": 60}
    torch.save(held, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    del sys.modules["their_trainer"]
    same(read_state(tmp_path / "c.pth"), weights())


def test_read_state_drops_what_parallel_training_put_before_the_names(tmp_path):
    torch.save({"net": {f"module.{name}": value for name, value in weights().items()}}, tmp_path / "c.pth")
    same(read_state(tmp_path / "c.pth"), weights())
    # a network that has a part called "module" keeps its names
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "d.pth")
    assert set(read_state(tmp_path / "d.pth")) == {"module.a", "b"}


def test_read_state_refuses_other_contents(tmp_path):
    for held in ([torch.ones(1)], torch.ones(1), {"net": {"a": 1.0}}, {"optimizer": {"a": torch.ones(1)}}):
        torch.save(held, tmp_path / "c.pth")
        with pytest.raises(CorruptFile, match="something else than named tensors"):
            read_state(tmp_path / "c.pth")


def test_plain_pickles_of_tensors_or_arrays(tmp_path):
    held = {"model": weights(), "__author__": "third_party", "matching_heuristics": True}
    file = tmp_path / "resnet.pkl"
    file.write_bytes(pickle.dumps(held))
    found = read_state(file)
    assert found.keys() == weights().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights().items())
    arrays = {name: tensor.detach().float().numpy() for name, tensor in weights().items()}
    file.write_bytes(pickle.dumps({"model": arrays}))
    assert all(np.array_equal(read_state(file)[name].numpy(), array) for name, array in arrays.items())


def test_nothing_runs_in_what_a_plain_pickle_holds_in_place_of_a_tensor(tmp_path):
    folder = tmp_path / "made"

    class Hidden:
        def __reduce__(self):
            inner = io.BytesIO()
            torch.save(Evil(folder), inner, _use_new_zipfile_serialization=False)
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    class Program:
        def __reduce__(self):
            inner = io.BytesIO()
            torch.save(torch.zeros(1), inner)
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    file = tmp_path / "evil.pkl"
    for held in (Hidden(), Evil(folder), Program()):
        file.write_bytes(pickle.dumps({"model": {"weight": held}}))
        with pytest.raises(CorruptFile, match=r"evil\.pkl"):
            read_state(file)
    assert not folder.exists()
