"""Compile the GPU's kernels ahead of time, without a GPU, and print what each takes, as JSON: run by
test_gpu_compile.py in a process of its own, because triton interprets or compiles, but not both in one.

    python -P tests/kernels/compile_gpu.py cuda:80 cuda:90 hip:gfx942
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

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


def cases(arch, dims, quantised):
    """(kernel, types of its pointers, constexprs, options) of one shape: 8 KV heads, group 4; 576: MLA, group 128."""
    mla = dims == 576
    spec = (
        AttentionSpec(128, 1, 1, 576, 512, 0.1, v_in_k=True)
        if mla
        else AttentionSpec(32, 8, 8, dims, dims, 0.1)
    )
    layout = KVLayout.of(spec, layers=32, format=KVFormat.INT8 if quantised else KVFormat.BFLOAT16)
    decode = tuning.partial_tiles(arch, dims, full_precision=False)
    prefill = tuning.extend_tiles(arch, dims, full_precision=False)
    common = {**ops._dims(spec), "SOFT_CAP": None, "WINDOW": None, "DTYPE": tl.bfloat16}

    def cut(tile):
        heads = ops.Heads.of(spec, wide_m=tile.block_m)
        return {"HEADS": heads.heads, "TILE_HEADS": heads.tile_heads}

    stored = {"memory": "*i8", "scales": "*bf16"} if quantised else {"memory": "*bf16", "scales": "*u8"}
    widths = {"narrow": decode._replace(block_m=tuning.NARROW_M), "wide": decode}
    for name, tile in widths.items():
        if tile.block_m >= cut(decode)["TILE_HEADS"]:
            constants = common | cut(decode) | ops._stored(layout) | {"ALIGN_BYTES": 16}
            yield f"partial {name}", partial_kernel, stored, constants, tile
    if quantised:
        return
    constants = common | cut(prefill) | {"K_HEADS_PER_GROUP": 1, "V_HEADS_PER_GROUP": 1}
    yield "extend", extend_kernel, {}, constants, prefill
    yield (
        "reduce",
        reduce_kernel,
        {},
        ops._reduce_shape(spec, ops.Heads.of(spec, wide_m=decode.block_m)),
        None,
    )
    yield "merge", merge_kernel, {}, ops._merge_shape(spec.q_heads, spec.v_dim), None


def compile_one(kernel, pointers, constants, tile, target):
    """The compiled kernel, specialised as the launcher does for aligned tensors with contiguous rows."""
    if tile is not None:
        constants = constants | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names} | (
        {"lse_head": 1} if "lse_head" in kernel.arg_names else {}
    )
    types, aligned = {}, []
    pointers = POINTERS | dict.fromkeys(("q", "k", "v", "o"), "*bf16") | pointers
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name == "states":
            types[name] = (("*bf16", "*fp32"),) * MERGED_STATES
            aligned += [(i, n, part) for n in range(MERGED_STATES) for part in range(2)]
        elif name == "strides":
            types[name] = (("i32", "i32", "i32", "i32"),) * MERGED_STATES
            aligned += [(i, n, part) for n in range(MERGED_STATES) for part in range(2)]
        elif name in pointers:
            types[name] = pointers[name]
            aligned.append((i,))
        else:
            types[name] = "fp32" if name == "scale" else "i32"
            if name.startswith(("q_", "k_head", "k_token", "v_head", "v_token", "o_")):
                aligned.append((i,))
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs=constants,
        attrs={path: [["tt.divisibility", 16]] for path in aligned},
    )
    launch = {} if tile is None else {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=target, options=launch)


def resources(binary, target):
    """Registers and spills of a thread, bytes of shared memory of a program."""
    if target.backend == "hip":
        amd = binary.asm["amdgcn"]
        number = {key: int(re.search(rf"\.{key}:\s+(\d+)", amd)[1]) for key in (
            "vgpr_count", "agpr_count", "vgpr_spill_count", "sgpr_spill_count", "group_segment_fixed_size",
            "private_segment_fixed_size",
        )}  # fmt: skip
        return {
            "registers": number["vgpr_count"],
            "spills": number["vgpr_spill_count"] + number["sgpr_spill_count"],
            "stack": number["private_segment_fixed_size"],
            "shared": number["group_segment_fixed_size"] or binary.metadata.shared,
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    number = {key: int(re.search(rf"{key}:(\d+)", report)[1]) for key in ("REG", "STACK", "LOCAL")}
    return {
        "registers": number["REG"],
        "spills": number["LOCAL"],
        "stack": number["STACK"],
        "shared": binary.metadata.shared,
    }


def main(targets):
    rows = []
    for name in targets:
        target = target_of(name)
        for dims in (64, 128, 576):
            for quantised in (False, True):
                for title, kernel, pointers, constants, tile in cases(target.arch, dims, quantised):
                    binary = compile_one(kernel, pointers, constants, tile, target)
                    row = {
                        "target": name,
                        "kernel": title,
                        "dims": dims,
                        "kv": "int8" if quantised else "bf16",
                    }
                    rows.append(row | resources(binary, target))
                    print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
