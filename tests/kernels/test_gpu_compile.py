"""The GPU kernels compile for the GPUs in SHARED_BYTES, within their registers and shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = {"cuda:80": 163 * 1024, "cuda:90": 227 * 1024, "hip:gfx942": 64 * 1024}
PROGRAMS_A_PROCESSOR = {"partial narrow": 2, "partial wide": 2, "extend": 1, "reduce": 4, "merge": 4}
"""At K dims 64 and 128. Decoding hides latency with several programs per SM or compute unit."""
REGISTERS = {"cuda": 65536, "hip": 4 * 512 * 64}
"""Per SM or compute unit."""


def compiled(target, k_dims, formats, cache, *variant):
    """The objects that compile_gpu.py prints, from an empty cache. Fails if a kernel does not compile."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", Path(__file__).with_name("compile_gpu.py"), target, k_dims, formats, *variant],
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        print(*row.values(), sep="\t")
    return rows


@pytest.mark.parametrize("target", SHARED_BYTES)
def test_kernels_fit_without_spills(target, tmp_path):
    """Every kernel at K dims 64 and 128 in bfloat16, and those that read stored KV also in int8."""
    rows = compiled(target, "64,128", "bfloat16,int8", tmp_path)
    titles = [(row["kernel"], row["k_dim"], row["kv"]) for row in rows]
    assert {(kernel, k_dim, "bfloat16") for kernel in PROGRAMS_A_PROCESSOR for k_dim in (64, 128)} <= {
        *titles
    }
    assert {("partial narrow", 64, "int8"), ("partial wide", 128, "int8")} <= {*titles}
    for row in rows:
        programs = PROGRAMS_A_PROCESSOR[row["kernel"]]
        assert row["spills"] == 0, row
        assert row["shared"] <= SHARED_BYTES[target], row
        assert row["wide_loads"] or row["kernel"] in ("reduce", "merge"), row
        assert programs * row["threads"] * row["registers"] <= REGISTERS[target.split(":")[0]], row


@pytest.mark.heavy
@pytest.mark.parametrize("target", SHARED_BYTES)
def test_rarer_shapes_fit_without_spills(target, tmp_path):
    """K dim 256 and MLA's 576, soft caps and windows, float32. tuning.py lists the exceptions of gfx942."""
    rows = compiled(target, "256", "bfloat16,int8", tmp_path)
    if target.startswith("hip"):
        rows += compiled(target, "576", "bfloat16", tmp_path)
    else:
        rows += compiled(target, "576", "bfloat16,int8", tmp_path)
        rows += compiled(target, "64,128", "bfloat16", tmp_path, "capped")
    rows += compiled(target, "64,128,256,576", "float32", tmp_path)
    for row in rows:
        assert row["spills"] == 0, row
        assert row["shared"] <= SHARED_BYTES[target], row
