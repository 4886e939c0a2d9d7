"""Compiles the GPU kernels without a GPU and prints each one's resources, one JSON object per line.

test_gpu_compile.py runs it in a process of its own, because a process either interprets or compiles triton
kernels. The public functions are called on CPU tensors, with a driver that claims to be the target and
launches nothing. So the compiled kernels are those that a launch would use, with the same specialisations for
strides and alignments.

    python -P tests/kernels/compile_gpu.py cuda:90 64,128 bfloat16,int8 [capped]
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from farshore.kernels.base import AttentionSpec, KVLayout, Segments, State, WorkList
from farshore.kernels.formats import KVFormat
from farshore.kernels.gpu import ops
from farshore.kernels.gpu.tuning import NARROW_M, Device

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
PROCESSORS = 132
ROWS = 64
TOKENS = 1000
MERGED_STATES = 8


class Driver:
    """The methods of triton's driver that compiling calls."""

    def __init__(self, target):
        self.target = target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


def pretend(name):
    """Makes triton and our launchers see the named target. Returns it and a list that launches append to."""
    backend, arch = name.split(":")
    target = GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)
    compiled, run = [], JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        binary = run(kernel, *args, grid=grid, warmup=True, **options)
        width = options.get("BLOCK_M") if kernel.__name__ == "partial_kernel" else None
        suffix = {None: "", NARROW_M: " narrow"}.get(width, " wide")
        compiled.append((kernel.__name__.removesuffix("_kernel") + suffix, binary))

    triton.runtime.driver.set_active(Driver(target))
    JITFunction.run = compile_only
    ops.device_of = lambda index: Device(target.arch, PROCESSORS)
    return target, compiled


def call_all(k_dim, format, *, capped):
    """Calls every public function with 8 KV heads and 4 query heads each; at K dim 576 with MLA's shape, one
    group of 128 query heads. ``capped``: with a soft cap and a window, as Gemma has them."""
    spec = AttentionSpec(32, 8, 8, k_dim, k_dim, 0.1)
    if k_dim == 576:
        spec = AttentionSpec(128, 1, 1, 576, 512, 0.1, v_in_k=True)
    if capped:
        spec = spec._replace(soft_cap=50.0, window_tokens=512)
    dtype = torch.bfloat16 if format.quantised else format.dtype
    layout = KVLayout.of(spec, layers=2, format=format)
    q = torch.zeros(ROWS, spec.q_heads, k_dim, dtype=dtype)
    out = State.identity(ROWS, spec.q_heads, spec.v_dim, dtype=torch.bfloat16, device="cpu")

    # All rows on a shared segment take wide tiles; one row on a segment of its own takes narrow ones.
    memory = torch.zeros(layout.block_bytes * (TOKENS // layout.block_tokens + 1), dtype=torch.uint8)
    run = (0, layout.block_bytes, 0, TOKENS, 0, 0, spec.groups)
    work = WorkList.of([(0, ROWS, 0, 0, spec.groups), (0, 1, 1, 0, spec.groups)])
    positions = torch.full((ROWS,), TOKENS)
    plan = ops.plan(work, Segments.of([run, run]), memory, layout, spec, positions=positions)
    ops.partial(plan, 1, q, out=out)
    if format.quantised:
        # Only `partial` reads stored KV; `extend` takes plain tensors, and states are never quantised.
        return
    k = torch.zeros(spec.k_heads, TOKENS, k_dim, dtype=dtype)
    v = torch.zeros(spec.v_heads, TOKENS, spec.v_dim, dtype=dtype)
    ops.extend(q, k, v, spec, q_positions=positions, k_position=0, out=out)
    ops.merge([out] * MERGED_STATES, sink=torch.zeros(spec.q_heads), out=out)


def resources(binary, target):
    """Registers and spills of a thread, bytes of shared memory of a program, and whether it loads 16 bytes at
    a time."""
    row = {"threads": binary.metadata.num_warps * target.warp_size, "shared": binary.metadata.shared}
    if target.backend == "hip":
        assembly = binary.asm["amdgcn"]
        # Scalar registers spill into vector ones, the others into the private segment.
        names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        registers, *spills = (int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1]) for name in names)
        wide = "_load_dwordx4" in assembly
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            command = [CUOBJDUMP, "--dump-resource-usage", file.name]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        # Spilled registers are on the stack; LOCAL is memory that the kernel asks for.
        names = ("REG", "STACK", "LOCAL")
        registers, *spills = (int(re.search(rf"{name}:(\d+)", report)[1]) for name in names)
        wide = "cp.async.cg" in binary.asm["ptx"]
    return row | {"registers": registers, "spills": sum(spills), "wide_loads": wide}


def main(name, k_dims, formats, variant=""):
    target, compiled = pretend(name)
    for k_dim, format in product(map(int, k_dims.split(",")), map(KVFormat, formats.split(","))):
        call_all(k_dim, format, capped=variant == "capped")
        for title, binary in compiled:
            row = {"target": name, "kernel": title, "k_dim": k_dim, "kv": format.value}
            print(json.dumps(row | resources(binary, target)), flush=True)
        compiled.clear()


if __name__ == "__main__":
    main(*sys.argv[1:])
