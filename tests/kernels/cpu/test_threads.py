"""The native kernels' threads: splits, concurrent and asynchronous calls, forks, and missing resources."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from farshore.kernels.base import State

cpu = pytest.importorskip("farshore.kernels.cpu.attention", reason="the native kernels are not built here")
every_instruction_set = pytest.mark.parametrize("kernels", cpu.instruction_sets, indirect=True)


def run_script(script, folder):
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@every_instruction_set
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_a_sequence_split_among_threads(kernels, textbook, assert_close, sequence, threads):
    """The state is the textbook's, and its bits do not depend on which thread computes which split."""
    plan, q = sequence.plan(threads=threads), sequence.queries()
    first = sequence.run(plan, q)
    assert_close(
        first,
        textbook(
            q,
            sequence.stored.k,
            sequence.stored.v,
            sequence.spec,
            q_positions=torch.full((2,), sequence.tokens),
        ),
        2e-6,
    )
    for _ in range(30):
        again = sequence.run(plan, q)
        assert torch.equal(again.o, first.o) and torch.equal(again.lse, first.lse)


@every_instruction_set
def test_more_rows_than_a_thread_takes_at_once(kernels, textbook, assert_close, sequence):
    """300 rows share the sequence, at positions inside it."""
    q, positions = (
        sequence.queries(300),
        torch.randint(0, sequence.tokens, (300,), generator=torch.Generator().manual_seed(1)),
    )
    some = torch.arange(0, 300, 7)
    expected = textbook(
        q[some], sequence.stored.k, sequence.stored.v, sequence.spec, q_positions=positions[some]
    )
    for threads in (1, 3):
        out = sequence.run(sequence.plan(rows=300, positions=positions, threads=threads), q)
        assert_close(State(out.o[some], out.lse[some]), expected, 2e-6)


def test_many_callers_at_once(sequence):
    """Each caller has a plan of its own. A caller that finds the pool busy computes without it, to the same
    bits."""
    plans = [sequence.plan(threads=threads) for threads in (1, 2, 3, 5) for _ in range(3)]
    inputs = [sequence.queries(seed=i) for i in range(len(plans))]
    k, v = sequence.stored.k.float(), sequence.stored.v.float()
    positions = torch.arange(sequence.tokens)

    def work(i):
        outs = [sequence.run(plans[i], inputs[i]) for _ in range(10)]
        some = slice(100 * i, 100 * i + 80)
        q = sequence.queries(80, seed=i)
        extended = State.identity(80, 4, 64, device="cpu")
        cpu.extend(
            q, k, v, sequence.spec, q_positions=positions[some], k_position=0, out=extended, threads=1 + i % 4
        )
        both = State.identity(2, 4, 64, device="cpu")
        cpu.merge(outs[:2], out=both)
        return [*outs, extended, both]

    alone = [work(i) for i in range(len(plans))]
    with ThreadPoolExecutor(8) as callers:
        for before, states in zip(alone, callers.map(work, range(len(plans))), strict=True):
            for a, b in zip(before, states, strict=True):
                assert torch.equal(a.o, b.o) and torch.equal(a.lse, b.lse)


@pytest.mark.parametrize("between", ["nothing", "another call", "another asynchronous call"])
def test_an_asynchronous_call_is_done_after_wait(sequence, between):
    """Computed once, by any thread, whatever the calling thread computes before it waits."""
    plan, other = sequence.plan(threads=2), sequence.plan(threads=3)
    q, q_other = sequence.queries(), sequence.queries(seed=1)
    expected, expected_other = sequence.run(plan, q), sequence.run(other, q_other)
    for _ in range(50):
        out, out_other = (State(torch.full((2, 4, 64), 7.0), torch.full((2, 4), 7.0)) for _ in range(2))
        cpu.partial_async(plan, 1, q, out=out)
        if between == "another call":
            cpu.partial(other, 1, q_other, out=out_other)
        elif between == "another asynchronous call":
            cpu.partial_async(other, 1, q_other, out=out_other)
        cpu.wait()
        assert torch.equal(out.o, expected.o) and torch.equal(out.lse, expected.lse)
        if between != "nothing":
            assert torch.equal(out_other.o, expected_other.o)
    cpu.wait()  # Nothing is under way.


def test_asynchronous_calls_of_several_threads(sequence):
    """One caller has the pool until it waits; the others compute before ``partial_async`` returns."""

    def caller(seed):
        plan, q = sequence.plan(threads=2), sequence.queries(seed=seed)
        expected, out = sequence.run(plan, q), State.identity(2, 4, 64, device="cpu")
        for _ in range(100):
            out.o.fill_(7.0)
            cpu.partial_async(plan, 1, q, out=out)
            cpu.wait()
            assert torch.equal(out.o, expected.o)

    with ThreadPoolExecutor(4) as callers:
        list(callers.map(caller, range(4)))


FORK = """
import os
import torch
from farshore.kernels.cpu import attention as cpu
from farshore.kernels.base import AttentionSpec, KVLayout, Segments, State, WorkList
from farshore.kernels.formats import KVFormat

torch.set_num_threads(1)
spec = AttentionSpec(4, 2, 2, 64, 64, scale=0.125)
layout = KVLayout.of(spec, layers=1, format=KVFormat.BFLOAT16)
memory = torch.randn(8 * layout.block_bytes // 2).bfloat16().view(torch.uint8)
plan = cpu.plan(
    WorkList.of([(0, 1, 0, 0, 2)]),
    Segments.of([(0, layout.block_bytes, 0, 2048, 0, 0, 2)]),
    memory, layout, spec, positions=torch.tensor([4000]), threads=3,
)
q = torch.randn(1, 4, 64).bfloat16()

def state():
    out = State.identity(1, 4, 64, device="cpu")
    cpu.partial(plan, 0, q, out=out)
    return out.o

here = state()
children = []
for _ in range(3):
    child = os.fork()
    if not child:
        os._exit(0 if all(torch.equal(state(), here) for _ in range(20)) else 1)
    children.append(child)
assert all(torch.equal(state(), here) for _ in range(20))
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
"""


def test_a_forked_child_computes(tmp_path):
    """A child has none of its parent's threads and starts its own."""
    run_script(FORK, tmp_path)


EXHAUST = """
import resource
import torch
from farshore.kernels.cpu import attention as cpu
from farshore.kernels.base import AttentionSpec, State

spec = AttentionSpec(1, 1, 1, 16384, 16384, 1.0)
x = torch.zeros(2048, 1, 16384)
out = State.identity(2048, 1, 16384, device="cpu")
warm = AttentionSpec(1, 1, 1, 64, 64, 1.0)
y = torch.zeros(2048, 1, 64)
positions = torch.arange(2048)
call = dict(q_positions=positions, k_position=0, threads=2)
small = State.identity(2048, 1, 64, device="cpu")
cpu.extend(y, y.view(1, 2048, 64), y.view(1, 2048, 64), warm, out=small, **call)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), -1))
try:
    cpu.extend(x, x.view(1, 2048, 16384), x.view(1, 2048, 16384), spec, out=out, **call)
except MemoryError:
    pass
else:
    raise SystemExit("there was memory")
cpu.extend(y, y.view(1, 2048, 64), y.view(1, 2048, 64), warm, out=small, **call)
assert small.lse.isfinite().all()
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures its own memory by /proc")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="asan ends the process instead")
def test_scratch_that_cannot_be_allocated_is_an_error_of_the_call(tmp_path):
    """MemoryError, whichever thread allocates, and the next call works."""
    run_script(EXHAUST, tmp_path)


NO_THREADS = """
import resource
import torch
from farshore.kernels.cpu import attention as cpu
from farshore.kernels.base import AttentionSpec, State

torch.set_num_threads(1)  # PyTorch's pool would end the process.
spec = AttentionSpec(1, 1, 1, 64, 64, 1.0)
y = torch.randn(2048, 1, 64)
out, again = State.identity(2048, 1, 64, device="cpu"), State.identity(2048, 1, 64, device="cpu")
call = dict(q_positions=torch.arange(2048), k_position=0)
cpu.extend(y, y.view(1, 2048, 64), y.view(1, 2048, 64), spec, out=out, threads=1, **call)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), -1))  # less than a thread's stack
cpu.extend(y, y.view(1, 2048, 64), y.view(1, 2048, 64), spec, out=again, threads=8, **call)
assert torch.equal(out.o, again.o) and torch.equal(out.lse, again.lse)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures its own memory by /proc")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="asan takes the memory")
def test_without_memory_for_threads_the_caller_computes(tmp_path):
    """At the limit of threads, or of memory for their stacks, a call is slower and raises no error."""
    run_script(NO_THREADS, tmp_path)
