"""A simulated CUDA GPU in pure Python, to find GPU-only errors on a machine without one.

    sim = simdevice.install()                     # before the code under test looks for a GPU
    torch.ones(2, device="cuda") + torch.ones(2)  # RuntimeError: Expected all tensors to be on the same device
    sim.syncs, sim.trainings()                    # where the host waits for the GPU; how often in a training step

A simulated tensor is CPU memory whose device is "cuda:0", with the dispatch key CUDA. DLPack makes it (the
capsule's device is rewritten on the way): nothing is copied, and views, autograd, autocast for "cuda", `Module.to`, the
optimisers' foreach paths, GradScaler and Lightning's CUDA accelerator are PyTorch's own. One boxed fallback for the key
CUDA runs every operator's CPU kernel on the same memory. It raises, as a GPU does, when
 * a CPU tensor with one or more axes meets a CUDA tensor (but for copies, and for indices of a CUDA tensor), or a CPU
   tensor is to be written from CUDA tensors;
 * `.numpy()` or `np.asarray` is called on a CUDA tensor;
 * a CPU generator is to fill a CUDA tensor;
 * an operator has no CUDA kernel for this (`NO_INTEGERS`, `NO_KERNEL`).
The GPU's random numbers are a stream of their own, seeded by `torch.manual_seed` as on a GPU.

It cannot show: memory, asynchrony (a kernel's error comes at once), streams and events, cuDNN and fused attention (SDPA
takes its "math" path), several GPUs, rounding, device-side asserts, `torch.Generator("cuda")`, and
`torch.tensor(…, device="cuda")` below a `FlopCounterMode`. It needs a CPU build of PyTorch on Linux; made with 2.13,
whose C++ tables it relies on (`_gpu`). It holds for the whole process and for its forks; there is no uninstall.
"""

from __future__ import annotations

import collections
import ctypes
import math
import statistics
import sys
import types
import warnings
import weakref
from pathlib import Path

import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.optim.optimizer import register_optimizer_step_post_hook

CPU, CUDA = 1, 2  # DLPack's numbers of the kinds of device
KEYS, aten = DispatchKeySet(DispatchKey.CPU), torch.ops.aten
# operators whose tensors may be of both devices, and those whose indices may be on the CPU with a CUDA tensor
BOTH = {"copy_", "_copy_from", "_copy_from_and_resize", "_pack_padded_sequence"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# their CUDA kernels wait for the GPU, since a size or value is needed on the host
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive"}
WAITS |= {"bincount", "nms", "_linalg_check_errors"}
# of these CUDA has no kernel for integers, or none at all
NO_INTEGERS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "avg_pool2d", "max_pool2d_with_indices"}
NO_INTEGERS |= {f"{aa}upsample_{how}2d{end}" for how in ("bilinear", "bicubic") for aa, end in (("", ""), ("_", "_aa"))}
NO_KERNEL = {"histogram", "_histogramdd_bin_edges", "_histogramdd_from_bin_cts", "_histogramdd_from_bin_tensors"}
# these take a number for a tensor without an overload of their own for it (`should_allow_numbers_as_tensors`)
NUMBERS = {"add", "sub", "mul", "div", "rsub", "true_divide", "multiply", "subtract", "divide"}


class Sim:
    """What happened so far."""

    def __init__(self, project: tuple[str, ...]):
        self.project = project
        self.syncs: collections.Counter = collections.Counter()  # (kind, where): times
        self.steps: list[tuple] = []  # of each training: optimiser, where it steps, a Counter of waits a step
        self.pinned: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # by id: tensors in pinned memory
        self.generator, self.kernels, self._before = torch.Generator(), 0, collections.Counter()

    def where(self, depth: int = 3) -> str:
        """The innermost frames of the code under test, innermost first."""
        frame, found = sys._getframe(2), []
        while frame and len(found) < depth:
            name = frame.f_code.co_filename
            if any(part in name for part in self.project):
                found.append(f"{name.rsplit('/companion/', 1)[-1]}:{frame.f_lineno}")
            frame = frame.f_back
        return " < ".join(found) or "outside of the project"

    def wait(self, kind: str) -> None:
        self.syncs[kind, self.where()] += 1

    def stepped(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """After an optimiser's step: what was waited for since the last one."""
        if not self.steps or self.steps[-1][0] is not optimizer:
            self.steps.append((optimizer, self.where(5), []))
        self.steps[-1][2].append(self.syncs - self._before)
        self._before = self.syncs.copy()

    def trainings(self) -> list[tuple[str, int, dict]]:
        """Of each training: where it steps, how many steps, and what half of them or more waited for (no set-up)."""
        found = []
        for _, place, each in self.steps:
            middle = {what: statistics.median_low(e[what] for e in each) for what in set().union(*each)}
            found.append((place, len(each), {what: n for what, n in middle.items() if n}))
        return found


sim: Sim | None = None
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _as(tensor: torch.Tensor, kind: int) -> torch.Tensor:
    """The same memory as a tensor of the other device. A DLTensor begins: void* data; int32 kind, index."""
    capsule = torch._C._to_dlpack(tensor)
    start = _pointer(capsule, b"dltensor")
    ctypes.c_int32.from_address(start + 8).value, ctypes.c_int32.from_address(start + 12).value = kind, 0
    return torch._C._from_dlpack(capsule)


class _Op:
    """What the fallback has to know of an operator."""

    def __init__(self, op):
        schema, inputs = op._schema, op._schema.arguments
        self.full, self.short = schema.name, schema.name.split("::")[-1]
        self.base, self.names = self.short.removesuffix("_"), [a.name for a in inputs]
        self.tensors = [a.name for a in inputs if str(a.type) == "Tensor"]
        self.written = {a.name for a in inputs if a.alias_info and a.alias_info.is_write}
        self.outs = [a.name for a in inputs if a.kwarg_only and a.name in self.written]
        sets = {frozenset(a.alias_info.before_set): a.name for a in inputs if a.alias_info}
        same = [(r, sets.get(frozenset(r.alias_info.before_set)) if r.alias_info else None) for r in schema.returns]
        self.returned = [name if name and r.alias_info.is_write else None for r, name in same]  # inputs given back
        self.native = self.full == "aten::set_" or any(name and not r.alias_info.is_write for r, name in same)
        self.draws = torch.Tag.nondeterministic_seeded in op.tags
        self.waits = self.base in WAITS or (self.base == "repeat_interleave" and "repeats" in self.names)


_ops: dict = {}


def _run(op, *args, **kwargs):
    """Any operator on CUDA tensors: its CPU kernel on their memory."""
    about = _ops.get(op) or _ops.setdefault(op, _Op(op))
    if about.native:  # a view: shape, strides and offset change, the storage stays. The CPU's kernel suits any tensor
        return op.redispatch(KEYS, *args, **kwargs)
    sim.kernels += 1
    given = dict(zip(about.names, args, strict=False)) | kwargs
    cuda, host = [], []

    def down(value, name):
        if isinstance(value, torch.Tensor):
            (cuda if value.is_cuda else host).append((name, value))
            return _as(value, CPU) if value.is_cuda else value
        if isinstance(value, list | tuple) and value and not isinstance(value[0], int | float):
            return [down(v, name) for v in value]
        if isinstance(value, torch.Generator) and value is not sim.generator:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        return torch.device("cpu") if isinstance(value, torch.device) else value

    lowered = {name: down(value, name) for name, value in given.items()}
    _look(about, given, cuda, host)
    for name in about.outs:  # an empty one is grown by the kernel
        if isinstance(given.get(name), torch.Tensor) and not given[name].numel():
            lowered[name] = torch.empty(0, dtype=given[name].dtype)
    default = None
    if "generator" in about.names:
        lowered["generator"] = lowered.get("generator") or sim.generator
    elif about.draws:  # from the default stream: lend it the GPU's
        default = torch.default_generator.get_state()
        torch.default_generator.set_state(sim.generator.get_state())
    # a number instead of a tensor came from Python: use the overload for numbers if there is one
    numbers = about.base not in NUMBERS and any(isinstance(given.get(n), int | float | complex) for n in about.tensors)
    rest = {name: lowered[name] for name in about.names[len(args) :] if name in lowered}
    call = op.overloadpacket if numbers else op
    result = call(*(lowered[name] for name in about.names[: len(args)]), **rest)
    if default is not None:
        sim.generator.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(default)
    for name in about.outs:
        if isinstance(given.get(name), torch.Tensor) and given[name].shape != lowered[name].shape:
            _become(given[name], lowered[name])

    def up(value):
        if isinstance(value, torch.Tensor):
            return value if value.is_cuda else _as(value, CUDA)
        return [up(v) for v in value] if isinstance(value, list | tuple) else value

    if len(about.returned) < 2:
        return given[about.returned[0]] if any(about.returned) else up(result)
    return tuple(given[n] if n else up(r) for n, r in zip(about.returned, result, strict=True))


def _look(about: _Op, given: dict, cuda: list, host: list) -> None:
    """Raise or note what a GPU would not do, and note what it would wait for."""
    if about.base in NO_KERNEL:
        raise NotImplementedError(f"Could not run '{about.full}' with arguments from the 'CUDA' backend.")
    if about.base in NO_INTEGERS and not (cuda[0][1].is_floating_point() or cuda[0][1].is_complex()):
        raise NotImplementedError(f'"{about.short}_cuda" not implemented for {cuda[0][1].dtype}')
    for name, t in host if cuda and about.short not in BOTH else ():
        if about.short in INDEXED and name == "indices" and given["self"].is_cuda:
            sim.wait("to the GPU, indices")
        elif t.ndim or name in about.written or about.base in ("cat", "stack"):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({about.full}, argument {name}, {tuple(t.shape)} {t.dtype})"
            )
    if about.waits:
        sim.wait(about.short)
    elif about.short in INDEXED and any(
        i is not None and i.dtype in (torch.bool, torch.uint8) for i in given["indices"]
    ):
        sim.wait("mask as index")


def _become(tensor: torch.Tensor, found: torch.Tensor) -> None:
    """`tensor` takes the memory and the shape of the CPU tensor `found`."""
    new = _as(found, CUDA)
    set_ = aten.set_.source_Storage_storage_offset
    set_.redispatch(KEYS, tensor, new.untyped_storage(), new.storage_offset(), new.shape, new.stride())


def _copy(self, src, non_blocking=False):
    """`copy_`, and with it every `.to`. From pageable memory to the GPU it is waited for as well."""
    if self.is_cuda != src.is_cuda and not (non_blocking and id(src) in sim.pinned):
        sim.wait("to the GPU" if self.is_cuda else "to the host")
    (_as(self, CPU) if self.is_cuda else self).copy_(_as(src, CPU) if src.is_cuda else src)
    return self


def _resize(self, size, memory_format=None):
    if tuple(self.shape) != tuple(size):
        new, kept = torch.empty(size, dtype=self.dtype), min(self.numel(), math.prod(size))
        new.view(-1)[:kept] = _as(self, CPU).reshape(-1)[:kept]
        _become(self, new)
    return self


def _softmax(op, x, dim, half_to_float):  # autocast asks a GPU for both at once, which a CPU has no kernel for
    return _run(op, x.float() if half_to_float else x, dim, False)


def _softmax_backward(op, grad, output, dim, input_dtype):
    return _run(op, grad, output, dim, grad.dtype).to(input_dtype)


def install(project: tuple[str, ...] = ("/lib/companion/", "<cell")) -> Sim:
    """Make "cuda" the simulated GPU, once per process. `project`: parts of the names of files that are under test.

    Where there is a real GPU, it is the real one, and waits are those that PyTorch reports.
    """
    global sim
    if sim:
        return sim
    sim = Sim(project)
    if torch.cuda.is_available():
        _watch()
        return sim
    if torch.backends.cuda.is_built():
        raise RuntimeError("this PyTorch knows real GPUs; the simulation needs a CPU build")
    _gpu()
    torch.autograd.set_multithreading_enabled(False)  # there are no threads for devices
    everything, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(_run, "CUDA")
    own.impl("copy_", _copy, "CUDA")
    own.impl("resize_", _resize, "CUDA")
    own.impl("_fused_sdp_choice", lambda *_, **__: 0, "CUDA")
    # without a kernel of their own these decompose: into many small ones, or into convolutions that only a GPU has
    has, names = torch._C._dispatch_has_kernel_for_dispatch_key, ["aten::convolution", "aten::convolution_backward"]
    for name in (n for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::") and not has(n, "CUDA")):
        if name.startswith("aten::_foreach_") or has(name, "CompositeExplicitAutogradNonFunctional"):
            names.append(name)
    for name in names:
        base, _, overload = name.removeprefix("aten::").partition(".")
        op = getattr(getattr(aten, base), overload or "default")
        if torch.Tag.inplace_view not in op.tags and not _Op(op).native:
            special = {
                "_softmax": _softmax,
                "_log_softmax": _softmax,
                "_softmax_backward_data": _softmax_backward,
                "_log_softmax_backward_data": _softmax_backward,
            }
            run = _run if overload else special.get(base, _run)
            own.impl(
                name.removeprefix("aten::"), lambda *args, _op=op, _r=run, **kwargs: _r(_op, *args, **kwargs), "CUDA"
            )
    sim.libraries = everything, own  # they hold the registrations
    _python()
    return sim


def _watch() -> None:
    """Count the waits of a real GPU."""
    show = warnings.showwarning

    def seen(message, *where, **how):
        if "synchronizing CUDA operation" in str(message):
            sim.wait("reported")
        else:
            show(message, *where, **how)

    warnings.showwarning = seen
    warnings.filterwarnings("always", ".*synchronizing CUDA operation")
    torch.cuda.set_sync_debug_mode("warn")
    register_optimizer_step_post_hook(sim.stepped)


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self):
        return torch._C._autograd.DeviceType.CUDA


def _gpu() -> None:
    """C++ interface of the GPU: a device guard, and hooks that report CUDA as available."""
    library = {
        name: ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"lib{name}.so")) for name in ("c10", "torch_cpu")
    }
    # PyTorch takes a guard in Python for PrivateUse1 alone: register it there, and copy it to CUDA's entry (1)
    sim.guard = _Guard()
    torch._C._acc.register_python_privateuseone_device_guard(sim.guard)
    guards = (ctypes.c_void_p * 21).in_dll(library["c10"], "_ZN3c104impl26device_guard_impl_registryE")
    guards[1] = guards[20]
    # CUDAHooksInterface: its table of 50 entries begins 16 bytes before what the object points to. In the order of the
    # headers: isBuilt, isAvailable, hasPrimaryContext (no), init (nothing), hasCUDA
    get = library["torch_cpu"]._ZN2at6detail12getCUDAHooksEv
    get.restype = ctypes.c_void_p
    hooks = ctypes.c_void_p.from_address(get())
    table = (ctypes.c_void_p * 50).from_buffer_copy(ctypes.string_at(hooks.value - 16, 400))
    kind = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
    sim.hooks = table, [kind(lambda _, said=said: said) for said in (True, True, False, False, True)]
    for slot, function in zip((2, 3, 4, 5, 16), sim.hooks[1], strict=True):
        table[2 + slot] = ctypes.cast(function, ctypes.c_void_p).value
    hooks.value = ctypes.addressof(table) + 16


def _python() -> None:
    """Python interface of the GPU, and the few functions through which a tensor leaves PyTorch."""
    gpu = types.SimpleNamespace(
        name="simulated GPU", major=8, minor=0, total_memory=80_000_000_000, multi_processor_count=108
    )
    nothing = ["init", "_lazy_init", "set_device", "empty_cache", "reset_peak_memory_stats"]
    zero = ["current_device", "_exchange_device", "_maybe_exchange_device"]
    zero += [f"{peak}memory_{kind}" for peak in ("", "max_") for kind in ("allocated", "reserved")]
    # a function for each name: torch._dynamo wants no two alike
    torch.cuda.__dict__.update({n: (lambda *_, **__: None) for n in nothing} | {n: (lambda *_, **__: 0) for n in zero})
    torch.cuda.__dict__.update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        get_device_name=lambda *_: gpu.name,
        get_device_properties=lambda *_: gpu,
        get_device_capability=lambda *_: (gpu.major, gpu.minor),
        is_bf16_supported=lambda *_, **__: True,
        mem_get_info=lambda *_: (gpu.total_memory, gpu.total_memory),
        synchronize=lambda *_: sim.wait("synchronize"),
        manual_seed=lambda seed: sim.generator.manual_seed(seed),
        manual_seed_all=lambda seed: sim.generator.manual_seed(seed),
        get_rng_state=lambda *_: sim.generator.get_state(),
        set_rng_state=lambda state, *_: sim.generator.set_state(state),
    )

    def pinned(self, device=None):
        copy = self.clone()
        sim.pinned[id(copy)] = copy
        return copy

    torch.Tensor.pin_memory = pinned
    torch.Tensor.is_pinned = lambda self, device=None: id(self) in sim.pinned
    deepcopy = torch.Tensor.__deepcopy__

    def copied(self, memo):  # a plain tensor's own way asks for memory of the GPU
        if type(self) is not torch.Tensor or not self.is_cuda or not self.is_leaf:
            return deepcopy(self, memo)
        return memo.setdefault(id(self), self.detach().clone().requires_grad_(self.requires_grad))

    def placed(storage, location):  # `torch.load` of what was saved from the GPU
        if location.startswith("cuda"):
            return _as(torch.empty(0, dtype=torch.uint8).set_(storage), CUDA).untyped_storage()

    torch.Tensor.__deepcopy__ = copied
    torch.serialization.register_package(5, lambda _: None, placed)
    register_optimizer_step_post_hook(sim.stepped)
