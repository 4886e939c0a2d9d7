"""Compile the GPU's kernels ahead of time, without a GPU, and print what each takes, a JSON object a line.

test_gpu_compile.py runs it in a process of its own: triton interprets or compiles, but not both in one.

    python -P tests/kernels/compile_gpu.py cuda:90 64,128 bfloat16,int8
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from farshore.kernels.base import AttentionSpec, KVLayout
from farshore.kernels.formats import KVFormat
from farshore.kernels.gpu import ops, tuning
from farshore.kernels.gpu.extend import extend_kernel
from farshore.kernels.gpu.merge import merge_kernel
from farshore.kernels.gpu.partial import partial_kernel, reduce_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {
    "positions": "*i64",
    "base": "*i64",
    "stride": "*i64",
    "first": "*i32",
    "segment_position": "*i32",
    "segment_group0": "*i16",
    "segment_group1": "*i16",
    "tiles": "*i32",
    "parts": "*i32",
    "starts": "*i32",
    "part_o": "*fp32",
    "part_lse": "*fp32",
    "lse": "*fp32",
    "sink": "*fp32",
}
MERGED_STATES = 8


def target_of(name):
    backend, arch = name.split(":")
    return GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)


class Case(NamedTuple):
    title: str
    kernel: Any
    constants: dict
    tile: tuning.Tiles | None = None


def spec_of(k_dim):
    """8 KV heads, group 4; at K dim 576 MLA's shape, one group of 128."""
    if k_dim == 576:
        return AttentionSpec(128, 1, 1, 576, 512, 0.1, v_in_k=True)
    return AttentionSpec(32, 8, 8, k_dim, k_dim, 0.1)


def cases(arch, k_dim, format):
    """Every kernel as the launchers shape it. int8 has kernels of its own in ``partial`` alone, which reads
    stored KV: ``extend`` is given plain tensors, and states are never quantised."""
    spec, full = spec_of(k_dim), format is KVFormat.FLOAT32
    decode = tuning.partial_tiles(arch, k_dim, full_precision=full)
    prefill = tuning.extend_tiles(arch, k_dim, full_precision=full)
    heads = ops.Heads.of(spec, wide_m=decode.block_m)
    common = ops._dims(spec) | {
        "SOFT_CAP": None,
        "WINDOW": None,
        "DTYPE": tl.float32 if full else tl.bfloat16,
    }

    layout = KVLayout.of(spec, layers=32, format=format)
    decoding = common | cut(heads) | ops._stored(layout) | {"ALIGN_BYTES": 16}
    if heads.tile_heads <= tuning.NARROW_M < decode.block_m:
        yield Case("partial narrow", partial_kernel, decoding, decode._replace(block_m=tuning.NARROW_M))
    yield Case("partial wide", partial_kernel, decoding, decode)
    if not format.quantised:
        prefilling = common | cut(ops.Heads.of(spec, wide_m=prefill.block_m))
        prefilling |= {"K_HEADS_PER_GROUP": 1, "V_HEADS_PER_GROUP": 1}
        yield Case("extend", extend_kernel, prefilling, prefill)
        yield Case("reduce", reduce_kernel, ops._reduce_shape(spec, heads) | {"lse_head": 1})
        yield Case("merge", merge_kernel, ops._merge_shape(spec.q_heads, spec.v_dim) | {"lse_head": 1})


def cut(heads):
    return {"HEADS": heads.heads, "TILE_HEADS": heads.tile_heads}


def types_of(format):
    plain = "*fp32" if format is KVFormat.FLOAT32 else "*bf16"
    stored = {"memory": "*i8", "scales": "*bf16"} if format.quantised else {"memory": plain, "scales": "*u8"}
    return POINTERS | dict.fromkeys(("q", "k", "v", "o"), plain) | stored


def compile_one(case, pointers, target):
    """The compiled kernel, specialised as the launcher does for aligned tensors with contiguous rows."""
    names, constants, options = case.kernel.arg_names, dict(case.constants), {"enable_fp_fusion": True}
    if case.tile is not None:
        constants |= {"BLOCK_M": case.tile.block_m, "BLOCK_N": case.tile.block_n}
        options |= {"num_warps": case.tile.warps, "num_stages": case.tile.stages}
    if case.kernel is extend_kernel:
        constants["lse_head"] = 1
    types, aligned = {}, []
    for i, name in enumerate(names):
        if name in constants:
            types[name] = "constexpr"
        elif name in ("states", "strides"):
            each = (pointers["o"], "*fp32") if name == "states" else ("i32",) * 4
            types[name] = (each,) * MERGED_STATES
            aligned += [(i, n, part) for n in range(MERGED_STATES) for part in range(2)]
        else:
            types[name] = pointers.get(name, "fp32" if name == "scale" else "i32")
            if name in pointers or name.endswith(("_row", "_head", "_token")):
                aligned.append((i,))
    source = ASTSource(
        fn=case.kernel,
        signature=types,
        constexprs={name: value for name, value in constants.items() if name in names},
        attrs={path: [["tt.divisibility", 16]] for path in aligned},
    )
    return triton.compile(source, target=target, options=options)


def resources(binary, target):
    """Registers of a thread, what it keeps in memory for want of them, and bytes of shared memory of a program."""
    threads = binary.metadata.num_warps * target.warp_size
    if target.backend == "hip":
        # Scalar registers spill into vector ones, the others into the private segment.
        names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        vector, *spills = (int(re.search(rf"\.{name}:\s+(\d+)", binary.asm["amdgcn"])[1]) for name in names)
        return {
            "threads": threads,
            "registers": vector,
            "spills": sum(spills),
            "shared": binary.metadata.shared,
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Spilled registers lie on the stack; LOCAL is what a kernel asks for itself.
    registers, *spills = (int(re.search(rf"{name}:(\d+)", report)[1]) for name in ("REG", "STACK", "LOCAL"))
    return {
        "threads": threads,
        "registers": registers,
        "spills": sum(spills),
        "shared": binary.metadata.shared,
    }


def main(target_name, k_dims, formats):
    target = target_of(target_name)
    for k_dim, format in product(map(int, k_dims.split(",")), map(KVFormat, formats.split(","))):
        for case in cases(target.arch, k_dim, format):
            binary = compile_one(case, types_of(format), target)
            row = {"target": target_name, "kernel": case.title, "k_dim": k_dim, "kv": format.value}
            print(json.dumps(row | resources(binary, target)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
