"""The GPU kernels compile for the GPUs in SHARED_BYTES, within their registers and shared memory, by the
installed triton and by the one of the GPU machines that we build for."""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from farshore.benchmarks.gpu.dry import children
from farshore.benchmarks.gpu.dry.children import PROGRAMS_A_PROCESSOR, REGISTERS, SHARED_BYTES

TARGETS = tuple(SHARED_BYTES)
OLDER_TRITON = "triton==3.6.*"
"""Beside torch 2.11, on machines with H100 and H200."""


@pytest.fixture
def compiled(tmp_path):
    """compiled(module, arguments, ...) -> the kernels that a module of benchmarks/gpu/dry compiles, given
    each of the lists of arguments in a process of its own, as many at once as there are cores, from an empty
    cache. Fails if one does not compile, spills, or takes too much shared memory."""

    def rows_of(module, packages, arguments):
        cache = tempfile.mkdtemp(dir=tmp_path)
        return children.rows(module, *arguments, cache=cache, packages=packages)

    def run(module, *runs, packages=None, rare=False):
        with ThreadPoolExecutor(os.cpu_count()) as processes:
            lists = list(processes.map(partial(rows_of, module, packages), runs))
        assert all(lists)
        rows = [row for rows in lists for row in rows]
        for row in rows:
            print(*row.values(), sep="\t")
        found = [(row, children.faults(row, rare=rare)) for row in rows]
        assert [(row, faults) for row, faults in found if faults] == []
        return rows

    return run


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_fit_without_spills(compiled, target):
    check_kernels(compile_kernels(compiled, target), target)


def compile_kernels(compiled, target, **options):
    """Every kernel at K dims 64 and 128 in bfloat16, and those that read stored KV also in int8 and int4."""
    runs = [(target, k_dim, "bfloat16,int8,int4") for k_dim in ("64", "128")]
    return compiled("kernels", *runs, **options)


def check_kernels(rows, target):
    titles = [(row["kernel"], row["k_dim"], row["kv"]) for row in rows]
    assert {(kernel, k_dim, "bfloat16") for kernel in PROGRAMS_A_PROCESSOR for k_dim in (64, 128)} <= {
        *titles
    }
    for kv in ("int8", "int4"):
        assert {("partial narrow", 64, kv), ("partial wide", 128, kv)} <= {*titles}
    for row in rows:
        registers = PROGRAMS_A_PROCESSOR[row["kernel"]] * row["threads"] * row["registers"]
        assert registers <= REGISTERS[target.split(":")[0]], row


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(target, marks=pytest.mark.heavy if target == "cuda:90" else pytest.mark.soak)
        for target in TARGETS
    ],
)
def test_rarer_shapes_fit_without_spills(compiled, target):
    """K dim 256 and MLA's 576, soft caps and windows, float32. tuning.py lists the exceptions of gfx942."""
    compile_rarer_shapes(compiled, target)


def compile_rarer_shapes(compiled, target, **options):
    runs = [(target, "64,128,256,576", "float32"), (target, "256", "bfloat16,int8,int4")]
    if target.startswith("hip"):
        runs += [(target, "576", "bfloat16,int4")]
    else:
        runs += [(target, "576", "bfloat16,int8,int4"), (target, "64,128", "bfloat16", "capped")]
    compiled("kernels", *runs, rare=True, **options)


SHAPES = (
    "9,3,64:bfloat16",
    "9,3,64:float32",
    "14,2,64:float16",
    "32,8,128:bfloat16",
    "32,8,128:int8",
    "32,8,128:int4",
    "64,8,128:bfloat16",
)
"""SmolLM2's heads, Qwen2's, and those of Llama 8B and 70B. ``bench gpu --dry`` compiles the first for sm_90,
in a test of its own."""


def check_launches(rows):
    for shape in SHAPES:
        # In float32, wide tiles are as wide as narrow ones.
        widths = {"partial narrow"} if shape.endswith("float32") else {"partial narrow", "partial wide"}
        assert {row["kernel"] for row in rows if row["shape"] == shape} >= widths
    assert {row["kernel"] for row in rows} == {*PROGRAMS_A_PROCESSOR}


@pytest.mark.soak
@pytest.mark.parametrize("target", TARGETS)
def test_what_engine_and_shards_launch_fits_without_spills(compiled, target):
    """As they launch it: views of heads and chunks, odd strides, states in several dtypes."""
    check_launches(compiled("launches", (target, *SHAPES)))


@pytest.fixture(scope="module")
def older_triton(tmp_path_factory):
    """A folder with triton 3.6 alone: 190 MB to download. Skips where no package index can be reached."""
    folder = tmp_path_factory.mktemp("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, OLDER_TRITON],
        capture_output=True,
        text=True,
        timeout=900,
    )
    if "from versions: none" in done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.soak
@pytest.mark.parametrize("target", TARGETS)
def test_the_older_triton_compiles_everything_without_spills(compiled, older_triton, target):
    rows = compile_kernels(compiled, target, packages=older_triton)
    assert {row["triton"].rpartition(".")[0] for row in rows} == {"3.6"}
    check_kernels(rows, target)
    compile_rarer_shapes(compiled, target, packages=older_triton)
    check_launches(compiled("launches", (target, *SHAPES), packages=older_triton))
