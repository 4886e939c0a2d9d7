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


ALONE = Path(__file__).with_name("compile_gpu.py")
SERVING = Path(__file__).parents[1] / "workers" / "engine" / "gpu" / "compile_launches.py"


def compiled(script, cache, *arguments):
    """The objects that a script prints, from an empty cache. Fails if a kernel does not compile."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", script, *arguments],
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
    rows = compiled(ALONE, tmp_path, target, "64,128", "bfloat16,int8")
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
    rows = compiled(ALONE, tmp_path, target, "256", "bfloat16,int8")
    if target.startswith("hip"):
        rows += compiled(ALONE, tmp_path, target, "576", "bfloat16")
    else:
        rows += compiled(ALONE, tmp_path, target, "576", "bfloat16,int8")
        rows += compiled(ALONE, tmp_path, target, "64,128", "bfloat16", "capped")
    rows += compiled(ALONE, tmp_path, target, "64,128,256,576", "float32")
    for row in rows:
        assert row["spills"] == 0, row
        assert row["shared"] <= SHARED_BYTES[target], row


SMALL, LARGE = "9,3,64:bfloat16", ("9,3,64:float32", "32,8,128:bfloat16", "32,8,128:int8")


@pytest.mark.parametrize(
    ("target", "shapes"),
    [
        pytest.param("cuda:90", (SMALL,), marks=pytest.mark.heavy, id="small"),
        *(
            pytest.param(target, (SMALL, *LARGE), marks=pytest.mark.soak, id=f"{target} all")
            for target in SHARED_BYTES
        ),
    ],
)
def test_what_engine_and_shards_launch_fits_without_spills(target, shapes, tmp_path):
    """As they launch it: views of heads and chunks, odd strides, states in several dtypes."""
    rows = compiled(SERVING, tmp_path, target, *shapes)
    for shape in shapes:
        # In float32, wide tiles are as wide as narrow ones.
        widths = {"partial narrow"} if shape.endswith("float32") else {"partial narrow", "partial wide"}
        assert {row["kernel"] for row in rows if row["shape"] == shape} >= widths
    assert {row["kernel"] for row in rows} == {*PROGRAMS_A_PROCESSOR}
    for row in rows:
        assert row["spills"] == 0, row
        assert row["shared"] <= SHARED_BYTES[target], row
        assert row["wide_loads"] or row["kernel"] in ("reduce", "merge"), row
