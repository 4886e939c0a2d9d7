"""Compiles triton's kernels without a GPU, for a named target, and tells each one's resources.

Used by ``kernels`` and ``launches``, in processes of their own, because a process either interprets triton's
kernels or compiles them. Launchers are called on CPU tensors, with a driver that claims to be the target and
launches nothing. So the compiled kernels are those that a launch would use, with the same specialisations for
strides and alignments. It must not know which launches there are.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from farshore.kernels.gpu import tuning
from farshore.kernels.gpu.tuning import NARROW_M, Device

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_PROCESSORS = 132

Compiled = list[tuple[str, Any]]
"""The kernels of launches so far: title and triton's binary."""


class _Driver:
    """The methods of triton's driver that compiling calls."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def pretend(name: str) -> tuple[GPUTarget, Compiled]:
    """Makes triton and our launchers see the target ``name`` in this process. Returns it and a list that
    launches append to."""
    backend, arch = name.split(":")
    target = GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)
    compiled: Compiled = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binary = run(kernel, *args, grid=grid, warmup=True, **options)
        width = options.get("BLOCK_M") if kernel.__name__ == "partial_kernel" else None
        suffix = {None: "", NARROW_M: " narrow"}.get(width, " wide")
        compiled.append((kernel.__name__.removesuffix("_kernel") + suffix, binary))

    triton.runtime.driver.set_active(_Driver(target))
    JITFunction.run = compile_only
    tuning.device_of = lambda index: Device(target.arch, _PROCESSORS)
    return target, compiled


def resources(binary: Any, target: GPUTarget) -> dict[str, Any]:
    """The compiler, registers and spills of a thread, bytes of shared memory of a program, and whether it
    loads 16 bytes at a time."""
    row = {
        "triton": triton.__version__,
        "threads": binary.metadata.num_warps * target.warp_size,
        "shared": binary.metadata.shared,
    }
    if target.backend == "hip":
        assembly = binary.asm["amdgcn"]
        # Scalar registers spill into vector ones, the others into the private segment.
        names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        registers, *spills = (int(_found(rf"\.{name}:\s+(\d+)", assembly)) for name in names)
        wide = "_load_dwordx4" in assembly
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            command = [_CUOBJDUMP, "--dump-resource-usage", file.name]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        # Spilled registers are on the stack; LOCAL is memory that the kernel asks for.
        registers, *spills = (int(_found(rf"{name}:(\d+)", report)) for name in ("REG", "STACK", "LOCAL"))
        wide = "cp.async.cg" in binary.asm["ptx"]
    return row | {"registers": registers, "spills": sum(spills), "wide_loads": wide}


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in the compiler's report"
    return match[1]
