"""CUDA tensors without a GPU: tensors with a device, shape and dtype, and no values.

Used by ``fakes``, in a process of its own. Code that mixes devices raises here as it would on a GPU, so that
a machine without one finds it. CPU tensors stay real, because plans and work lists are computed from their
values. A copy to the CPU gives ones. It must not know what is computed.

PyTorch's FakeTensorMode computes shapes and devices. This module adds what it lacks: it lets CPU tensors
through, refuses a CPU tensor that is indexed by a CUDA tensor, and checks the tensors of triton's launches.
"""

import subprocess
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.cpp_extension import include_paths, library_paths
from triton.runtime.jit import JITFunction

_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
}
"""
"""Operations look the current device up. A PyTorch without CUDA has no function for that, and aborts."""

aten = torch.ops.aten


class MixedDevices(RuntimeError):
    """Tensors of two devices in one call."""


class NotCaptured(RuntimeError):
    """A graph was to contain a copy from the host, or something that the host waits for."""


_WAITING = (aten._local_scalar_dense, aten.item, aten.nonzero, aten.masked_select, aten.is_nonzero)
_COPIES = (aten._to_copy, aten.to, aten.copy_, aten.where)
"""They copy tensors between host and device, and wait for that; ``where`` a number, too."""
_NUMBERS = (aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf)

_thread = threading.local()


@contextmanager
def captured() -> Iterator[None]:
    """This thread's calls would be captured in a graph: those that CUDA does not permit there raise
    NotCaptured."""
    _thread.captured = True
    try:
        yield
    finally:
        _thread.captured = False


class _Fakes(FakeTensorMode):
    """All threads share one. While a thread computes shapes, its fakes are on "meta"; those of others are
    not."""

    _thread = threading.local()

    @property
    def in_kernel_invocation(self) -> bool:
        return getattr(self._thread, "inside", False)

    @in_kernel_invocation.setter
    def in_kernel_invocation(self, inside: bool) -> None:
        self._thread.inside = inside


class _Shared:
    """What the modes of all threads share. FakeTensorMode is entered by one thread at a time."""

    def __init__(self) -> None:
        self.fakes = _Fakes(allow_non_fake_inputs=True)
        self.lock = threading.RLock()


class _Mode(TorchDispatchMode):
    """One thread's. Calls without CUDA tensors are not changed."""

    def __init__(self, shared: _Shared) -> None:
        super().__init__()
        self._shared = shared

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        # Pinned memory is host memory.
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        flat, form = tree_flatten((args, kwargs))
        if function is aten._pin_memory.default:
            return args[0].clone()
        if function is aten.is_pinned.default:
            return args[0].device.type == "cpu"
        if not any(map(_is_on_cuda, flat)):
            return function(*args, **kwargs)
        _check_index(function, args)
        if getattr(_thread, "captured", False):
            _check_captured(function, flat)
        if function in (aten._local_scalar_dense.default, aten.item.default):
            return torch.ones((), dtype=args[0].dtype, device="cpu").item()
        with self._shared.lock:
            return self._faked(function, flat, form)

    def _faked(self, function: Any, flat: list[Any], form: Any) -> Any:
        """Computes the result's shapes and devices. What it writes to CPU tensors is 1."""
        fakes = self._shared.fakes
        real: dict[int, Tensor] = {}
        given = []
        for value in flat:
            if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
                fake = fakes.from_tensor(value)
                real[id(fake)] = value
                value = fake
            given.append(value)
        args, kwargs = tree_unflatten(given, form)
        with fakes:
            result = function(*args, **kwargs)

        def on_host(fake: FakeTensor) -> Tensor:
            if id(fake) in real:  # Written in place.
                return real[id(fake)].fill_(1)
            if fake.device.type == "cpu":
                return torch.ones(fake.shape, dtype=fake.dtype, device="cpu")
            return fake

        return tree_map_only(FakeTensor, on_host, result)


def _is_on_cuda(value: Any) -> bool:
    return isinstance(value, FakeTensor) or (isinstance(value, torch.device) and value.type == "cuda")


def _check_index(function: Any, args: Any) -> None:
    """FakeTensorMode passes a CPU tensor that is indexed by a CUDA tensor; a GPU does not."""
    if function not in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default):
        return
    wrong = [index.device for index in args[1] if index is not None and index.device != args[0].device]
    if wrong and args[0].device.type == "cpu":
        raise MixedDevices(f"a tensor on cpu indexed by one on {wrong[0]}")


def _check_captured(function: Any, flat: list[Any]) -> None:
    devices = {value.type for value in flat if isinstance(value, torch.device)}
    devices |= {value.device.type for value in flat if isinstance(value, Tensor)}
    kind = function.overloadpacket
    by_mask = kind in (aten.index, aten.index_put_) and any(
        isinstance(value, Tensor) and value.dtype == torch.bool for value in flat[1:]
    )
    copies = function in _NUMBERS or (kind in _COPIES and "cpu" in devices)
    if kind in _WAITING or by_mask or copies:
        raise NotCaptured(f"{function} on {' and '.join(sorted(devices))} in a graph")


def _launch(kernel: JITFunction, *args: Any, grid: Any, **options: Any) -> None:
    """In place of a launch: every tensor must lie on the GPU. The kernel's outputs have no values anyway."""
    tensors = [value for value in tree_flatten(args)[0] if isinstance(value, Tensor)]
    for value in tensors:
        if value.device.type != "cuda":
            raise MixedDevices(f"{kernel.__name__} was given {tuple(value.shape)} on {value.device}")


def _register_guard() -> None:
    """Compiles and loads the guard, in about two seconds. Not if PyTorch has one of its own."""
    if torch.backends.cuda.is_built():
        return
    compiler = sysconfig.get_config_var("CXX") or "g++"
    with TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(_GUARD)
        headers = [f"-I{path}" for path in include_paths()]
        libraries = [*(f"-L{path}" for path in library_paths()), "-lc10"]
        command = [*compiler.split(), "-std=c++20", "-shared", "-fPIC", *headers, source, "-o", library]
        command += libraries
        subprocess.run(list(map(str, command)), check=True)
        torch.ops.load_library(library)


@contextmanager
def fake_cuda() -> Iterator[None]:
    """CUDA tensors without values, in this thread and in those that start meanwhile. Gradients must be
    off."""
    _register_guard()
    shared, run, launch, initialise = _Shared(), threading.Thread.run, JITFunction.run, torch.cuda._lazy_init

    def run_in_mode(thread: threading.Thread) -> None:
        torch._C._set_only_lift_cpu_tensors(True)
        with _Mode(shared):
            run(thread)

    threading.Thread.run = run_in_mode  # type: ignore[method-assign]
    JITFunction.run = _launch
    torch.cuda._lazy_init = lambda: None
    # Else torch.tensor(..., device="cuda") copies to a GPU before a mode sees it.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Mode(shared):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.cuda._lazy_init = initialise
        JITFunction.run = launch
        threading.Thread.run = run  # type: ignore[method-assign]
