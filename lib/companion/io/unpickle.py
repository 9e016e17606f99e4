"""Reads pickles of other projects without executing code from them.

Trainers pickle their own classes (settings, statistics) next to the weights, so `weights_only=True` refuses the file.
Here every class or function that is not on an allow list is replaced by an inert stand-in: nothing is imported or
executed, and the tensors are returned.
"""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

from ..errors import CorruptFile

# needed to rebuild tensors, arrays and plain containers; none of it executes code from the file
_SAFE = {
    ("collections", "OrderedDict"), ("collections", "defaultdict"), ("builtins", "set"), ("builtins", "frozenset"),
    ("builtins", "slice"), ("builtins", "complex"), ("builtins", "dict"), ("builtins", "list"),
    ("builtins", "int"), ("builtins", "float"), ("builtins", "bytearray"), ("_codecs", "encode"),
    ("torch._utils", "_rebuild_tensor"), ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"),
    ("torch.storage", "UntypedStorage"), ("torch.storage", "TypedStorage"), ("torch", "Size"), ("torch", "device"),
    ("numpy", "dtype"), ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"), ("numpy._core.numeric", "_frombuffer"),
}  # fmt: skip


class Inert:
    """Replaces an object of a class that is not read: accepts any arguments and does nothing."""

    def __new__(cls, *_: object, **__: object) -> Inert:
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object): ...

    def __setstate__(self, _: object) -> None: ...

    # a pickle may fill an object that is a list or a dict
    def append(self, _: object) -> None: ...

    def extend(self, _: object) -> None: ...

    def __setitem__(self, _: object, __: object) -> None: ...

    def __hash__(self) -> int:
        return id(self)

    # old files contain the source of networks, and torch reads an attribute of the class to report changes
    dump_patches = False


class Unpickler(pickle.Unpickler):
    """A pickle reader that returns `Inert` objects for everything that is not on the allow list."""

    def find_class(self, module: str, name: str) -> object:
        """The class or function named by the pickle if it is on the list; else the stand-in."""
        module = "builtins" if module == "__builtin__" else module  # its name in protocols 0 to 2, used by torch.save
        if (module, name) == ("torch.storage", "_load_from_bytes"):  # tensors in a plain pickle
            return _storage
        harmless = (module, name) in _SAFE or (module == "torch" and name.endswith("Storage")
                                               and hasattr(torch, name))  # fmt: skip
        return super().find_class(module, name) if harmless else Inert


def load(path: str | Path) -> object:
    """The content of a pickle, objects of unknown classes as `Inert`. Raises `CorruptFile` when it is not a pickle."""
    try:
        with Path(path).open("rb") as file:
            return Unpickler(file).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise CorruptFile(path, f"not a pickle ({type(error).__name__}: {error})") from error


def _storage(held: bytes) -> object:
    """The reference to a tensor's storage that `torch.save` wrote into a pickle."""
    if held[:4] == b"PK\3\4":
        raise ValueError("a TorchScript program may be in it")
    return torch.load(io.BytesIO(held), map_location="cpu", pickle_module=_reader(), weights_only=False)


def _reader() -> SimpleNamespace:
    """Replacement of the module `pickle` for torch.load, with the three names that it uses."""
    return SimpleNamespace(Unpickler=Unpickler, load=lambda file, **_: Unpickler(file).load(), __name__=__name__)


def load_torch(path: str | Path) -> object:
    """The content of a file of `torch.save`, on the CPU, objects of unknown classes as `Inert`.

    Raises `CorruptFile` when it is not such a file.
    """
    try:
        if _is_program(path):
            raise ValueError("a TorchScript program, which would run as it is loaded")
        with warnings.catch_warnings():
            # warning that a network's source differs from that of its stand-in
            warnings.simplefilter("ignore", torch.serialization.SourceChangeWarning)
            return torch.load(path, map_location="cpu", pickle_module=_reader(), weights_only=False)
    except Exception as error:
        raise CorruptFile(path, f"not a file of torch.save ({type(error).__name__}: {error})") from error


def _is_program(path: str | Path) -> bool:
    """Whether torch.load would treat the file as a TorchScript archive and pass it to torch.jit.load."""
    with Path(path).open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return False
    return "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records()
