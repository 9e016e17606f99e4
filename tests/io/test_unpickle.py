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
from companion.io import unpickle
from companion.io.unpickle import Inert
from tests.models.common import refuses

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
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=0)


@FORMATS
def test_a_checkpoint_with_foreign_objects_gives_its_tensors(tmp_path, trainer, zipped, recwarn):
    settings, slotted, path = trainer.Settings(), trainer.Slotted(), tmp_path / "checkpoint.pth.tar"
    settings.lr, settings.nested, slotted.value = 1e-4, trainer.Settings(), 3
    foreign = [settings, slotted, trainer.Log([1, 2]), trainer.Table(a=1), trainer.Mode.TRAIN, nn.Linear(2, 2)]
    held = {"epoch": 300, "net": weights(), "stats": defaultdict(list, loss=[0.5]), "keys": {settings: 1}}
    torch.save(held | {"foreign": foreign, "build": trainer.build}, path, _use_new_zipfile_serialization=zipped)
    del sys.modules["their_trainer"]
    found = unpickle.load_torch(path)
    assert found["epoch"] == 300 and found["stats"]["loss"] == [0.5]
    same(found["net"], weights())
    assert isinstance(found["net"]["parameter"], nn.Parameter)
    assert {type(value) for value in (*found["foreign"], *found["keys"])} == {Inert} and found["build"] is Inert
    assert "their_trainer" not in sys.modules and not recwarn.list


@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])  # the first is that of NumPy 1
@pytest.mark.parametrize("protocol", [0, 2])
def test_a_plain_pickle_gives_numpy_arrays_and_containers(tmp_path, module, protocol, recwarn):
    arrays = [np.linspace(0, 1, 7).reshape(1, 7), np.arange(6, dtype=np.int16).reshape(2, 3).T, np.array(["a", "bcd"])]
    plain = [np.float32(0.25), (2.5, None), {"a"}, frozenset({3}), b"raw", 1 + 2j, bytearray(b"x"), slice(1, 2)]
    text = pickle.dumps([plain, *arrays], protocol).replace(b"numpy._core", module)
    (tmp_path / "a.pkl").write_bytes(text)
    same_plain, *found = unpickle.load(tmp_path / "a.pkl")
    assert same_plain == plain and module in text and not recwarn.list
    for ours, theirs in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)


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
functools:partial numpy:load torch:load torch.hub:load companion.io.unpickle:load antigravity:fly
"""


def test_functions_that_reach_further_are_neither_given_nor_imported(tmp_path):
    pickles = [f"c{name.replace(':', chr(10))}\n.".encode() for name in REACHING.split()]
    # protocol 4 walks attributes: torch.Size.__init__.__globals__ would be a way to everything
    for name in ("Size.__new__", "serialization.os.systemStorage", "storage.sys.modules"):
        words = [pickle.SHORT_BINUNICODE + bytes([len(s)]) + s.encode() for s in ("torch", name)]
        pickles.append(pickle.PROTO + b"\x04" + b"".join(words) + pickle.STACK_GLOBAL + b".")
    for content in pickles:
        (tmp_path / "a.pkl").write_bytes(content)
        assert unpickle.load(tmp_path / "a.pkl") is Inert, content
    assert "antigravity" not in sys.modules


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_torchscript_program_is_refused(tmp_path, monkeypatch):
    """torch.load would pass it to torch.jit.load, which may run code."""
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("the program was loaded"))
    path = tmp_path / "program.pt"
    torch.jit.trace(nn.Identity(), torch.zeros(1)).save(str(path))
    refuses((lambda: unpickle.load_torch(path), "program.pt"), error=CorruptFile)


@pytest.mark.parametrize("content", [b"", b"<html>quota</html>", "missing", "zip", "legacy"])
def test_a_truncated_or_other_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "c.pt"
    if content in ("zip", "legacy"):
        torch.save({"net": {"w": torch.randn(500)}}, path, _use_new_zipfile_serialization=content == "zip")
        content = path.read_bytes()[: int(0.95 * path.stat().st_size)]
    if content != "missing":
        path.write_bytes(content)
    for read in (unpickle.load_torch, read_state):
        with pytest.raises(CorruptFile) as caught:
            read(path)
        assert caught.value.path == path


@FORMATS
@pytest.mark.parametrize("entry", ["net", "state_dict", "model", None])
def test_read_state_finds_the_weights(tmp_path, trainer, entry, zipped):
    held = weights() if entry is None else {entry: weights(), "settings": trainer.Settings(), "epoch": 60}
    torch.save(held, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    del sys.modules["their_trainer"]
    same(read_state(tmp_path / "c.pth"), weights())


def test_read_state_drops_the_prefix_of_parallel_training(tmp_path):
    for names, expected in ((["module.a", "module.b"], ["a", "b"]), (["module.a", "b"], ["module.a", "b"])):
        torch.save({"net": {name: torch.ones(1) for name in names}}, tmp_path / "c.pth")
        assert list(read_state(tmp_path / "c.pth")) == expected


def test_read_state_of_a_plain_pickle_takes_tensors_and_arrays(tmp_path):
    held = weights() | {"array": np.arange(6.0).reshape(2, 3)}
    (tmp_path / "resnet.pkl").write_bytes(pickle.dumps({"model": held, "__author__": "third_party"}))
    same(read_state(tmp_path / "resnet.pkl"), held | {"array": torch.from_numpy(held["array"])})


def test_nothing_runs_in_what_a_plain_pickle_holds_in_place_of_a_tensor(tmp_path):
    evil = Evil(tmp_path / "made")

    class Hidden:
        def __init__(self, held, zipped):
            self.held, self.zipped = held, zipped

        def __reduce__(self):
            inner = io.BytesIO()
            torch.save(self.held, inner, _use_new_zipfile_serialization=self.zipped)
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    file = tmp_path / "evil.pkl"
    for held in (evil, Hidden(evil, zipped=False), Hidden(torch.zeros(1), zipped=True)):  # a zip may be a program
        file.write_bytes(pickle.dumps({"model": {"weight": held}}))
        refuses((lambda: read_state(file), "evil.pkl"), error=CorruptFile)
    assert not evil.path.exists()
