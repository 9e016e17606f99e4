"""Reading pickles of other projects without running what is in them.

Trainers pickle their own classes (settings, statistics) next to the weights, so `weights_only=True` refuses the file.
Here every class or function that is not on a short list is replaced by an inert stand-in: nothing is imported, nothing
runs, and the tensors come out.
"""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

from ..errors import CorruptFile

# what rebuilding tensors, arrays and plain containers needs; none of it runs code of the file
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
    """Stands for an object of a class that is not read: it takes any arguments, and does nothing."""

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

    # old files hold the source of networks, and torch asks the class whether to write down how it changed
    dump_patches = False


class Unpickler(pickle.Unpickler):
    """A pickle reader that gives `Inert` objects for everything that is not on the list."""

    def find_class(self, module: str, name: str) -> object:
        """The class or function that the pickle names, when it is harmless; else the stand-in."""
        module = "builtins" if module == "__builtin__" else module  # as protocols 0 to 2, and so torch.save, call it
        if (module, name) == ("torch.storage", "_load_from_bytes"):  # tensors in a plain pickle
            return _storage
        harmless = (module, name) in _SAFE or (module == "torch" and name.endswith("Storage")
                                               and hasattr(torch, name))  # fmt: skip
        return super().find_class(module, name) if harmless else Inert


def load(path: str | Path) -> object:
    """What a pickle holds, objects of unknown classes as `Inert`. Raises `CorruptFile` when it is none."""
    try:
        with Path(path).open("rb") as file:
            return Unpickler(file).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise CorruptFile(path, f"not a pickle ({type(error).__name__}: {error})") from error


def _storage(held: bytes) -> object:
    """What `torch.save` wrote into a pickle in place of a tensor's numbers."""
    if held[:4] == b"PK\3\4":
        raise ValueError("a TorchScript program may be in it")
    return torch.load(io.BytesIO(held), map_location="cpu", pickle_module=_reader(), weights_only=False)


def _reader() -> SimpleNamespace:
    """What torch.load takes for the module `pickle`: these are the three names that it uses of it."""
    return SimpleNamespace(Unpickler=Unpickler, load=lambda file, **_: Unpickler(file).load(), __name__=__name__)


def load_torch(path: str | Path) -> object:
    """What a file of `torch.save` holds, on the CPU, objects of unknown classes as `Inert`.

    Raises `CorruptFile` when it is none.
    """
    try:
        if _is_program(path):
            raise ValueError("a TorchScript program, which would run as it is loaded")
        with warnings.catch_warnings():
            # of a network's source that is not that of its stand-in
            warnings.simplefilter("ignore", torch.serialization.SourceChangeWarning)
            return torch.load(path, map_location="cpu", pickle_module=_reader(), weights_only=False)
    except Exception as error:
        raise CorruptFile(path, f"not a file of torch.save ({type(error).__name__}: {error})") from error


def _is_program(path: str | Path) -> bool:
    """Whether torch.load would take the file for a TorchScript archive, and hand it to torch.jit.load."""
    with Path(path).open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return False
    return "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records()
