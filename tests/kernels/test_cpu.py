"""What is the native kernels' own: threads, forks, and that no argument makes them touch other memory."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from farshore.kernels.base import AttentionSpec, KVLayout, Rows, Segments, State
from farshore.kernels.formats import KVFormat

cpu = pytest.importorskip("farshore.kernels.cpu", reason="the native kernels are not built here")
every_instruction_set = pytest.mark.parametrize("kernels", cpu.instruction_sets, indirect=True)

SPEC = AttentionSpec(4, 2, 2, 64, 64, scale=0.125)
TOKENS = 3000
"""Enough for five threads to share."""


@pytest.fixture(scope="module")
def stored(store_tokens):
    """A sequence in float32 blocks of 256, its first token at slot 9."""
    return store_tokens(SPEC, KVFormat.FLOAT32, TOKENS, block_tokens=256, first=9)


def whole(stored, *, rows=2, positions=None, **options):
    """A plan of every row on the whole sequence."""
    return cpu.plan(
        Rows.of([(0, rows, 0, 0, 2)]),
        Segments.of([(0, stored.stride, 9, TOKENS, 0, 0, 2)]),
        stored.memory,
        stored.layout,
        SPEC,
        positions=torch.full((rows,), TOKENS) if positions is None else positions,
        **options,
    )


def queries(rows=2, seed=0):
    return torch.randn(rows, 4, 64, generator=torch.Generator().manual_seed(seed))


def run(plan, q):
    out = State.identity(*q.shape[:2], 64)
    cpu.partial(plan, 1, q, out=out)
    return out


@every_instruction_set
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_a_sequence_split_among_threads(kernels, textbook, assert_close, stored, threads):
    """Equal to the textbook, and bit for bit the same whoever computes what."""
    plan, q = whole(stored, threads=threads), queries()
    first = run(plan, q)
    assert_close(first, textbook(q, stored.k, stored.v, SPEC, q_positions=torch.full((2,), TOKENS)), 2e-6)
    for _ in range(30):
        again = run(plan, q)
        assert torch.equal(again.o, first.o) and torch.equal(again.lse, first.lse)


@every_instruction_set
def test_a_step_of_many_jobs_split_among_threads(kernels, textbook, assert_close, stored):
    """300 rows share the sequence, at positions inside of it: more rows than one job takes."""
    q, positions = queries(300), torch.randint(0, TOKENS, (300,), generator=torch.Generator().manual_seed(1))
    some = torch.arange(0, 300, 7)
    expected = textbook(q[some], stored.k, stored.v, SPEC, q_positions=positions[some])
    for threads in (1, 3):
        out = run(whole(stored, rows=300, positions=positions, threads=threads), q)
        assert_close(State(out.o[some], out.lse[some]), expected, 2e-6)


def test_many_callers_at_once(stored):
    """Each has its own plan; who does not get the pool computes alone, and the bits are the same."""
    plans = [whole(stored, threads=threads) for threads in (1, 2, 3, 5) for _ in range(3)]
    inputs = [queries(seed=i) for i in range(len(plans))]
    k, v = stored.k.float(), stored.v.float()
    positions = torch.arange(TOKENS)

    def work(i):
        outs = [run(plans[i], inputs[i]) for _ in range(10)]
        some = slice(100 * i, 100 * i + 80)
        q = queries(80, seed=i)
        extended = State.identity(80, 4, 64)
        cpu.extend(q, k, v, SPEC, q_positions=positions[some], k_position=0, out=extended, threads=1 + i % 4)
        both = State.identity(2, 4, 64)
        cpu.merge(outs[:2], out=both)
        return [*outs, extended, both]

    alone = [work(i) for i in range(len(plans))]
    with ThreadPoolExecutor(8) as callers:
        for before, states in zip(alone, callers.map(work, range(len(plans))), strict=True):
            for a, b in zip(before, states, strict=True):
                assert torch.equal(a.o, b.o) and torch.equal(a.lse, b.lse)


FORK = """
import os
import torch
from farshore.kernels import cpu
from farshore.kernels.base import AttentionSpec, KVLayout, Rows, Segments, State
from farshore.kernels.formats import KVFormat

torch.set_num_threads(1)
spec = AttentionSpec(4, 2, 2, 64, 64, scale=0.125)
layout = KVLayout.of(spec, layers=1, format=KVFormat.BFLOAT16)
memory = torch.randn(8 * layout.block_bytes // 2).bfloat16().view(torch.uint8)
plan = cpu.plan(
    Rows.of([(0, 1, 0, 0, 2)]),
    Segments.of([(0, layout.block_bytes, 0, 2048, 0, 0, 2)]),
    memory, layout, spec, positions=torch.tensor([4000]), threads=3,
)
q = torch.randn(1, 4, 64).bfloat16()

def state():
    out = State.identity(1, 4, 64)
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
    """It has none of its parent's threads, and starts its own."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", FORK], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def refused(match):
    return pytest.raises(ValueError, match=match)


def test_work_that_does_not_exist_is_refused(store_tokens):
    kv = store_tokens(SPEC, KVFormat.FLOAT32, 7, block_tokens=4)
    good = (0, kv.stride, 0, 7, 0, 0, 2)
    cases = [
        ([(0, 1, 1, 0, 2)], [good], "segments that are not among the 1"),
        ([(0, 1, -1, 0, 2)], [good], "segments that are not among the 1"),
        ([(0, 1, 0, 0, 2)], [], "segments that are not among the 0"),
        ([(-1, 1, 0, 0, 2)], [good], "rows that are not among the step's 2"),
        ([(1, 2, 0, 0, 2)], [good], "rows that are not among the step's 2"),
        ([(1, 2**31 - 1, 0, 0, 2)], [good], "rows that are not among the step's 2"),
        ([(0, 0, 0, 0, 2)], [good], "rows that are not among the step's 2"),
        ([(0, 1, 0, 1, 1)], [good], "groups asked"),
        ([(0, 1, 0, 0, 3)], [good], "groups asked"),
        ([(0, 1, 0, 0, 2)], [(0, kv.stride, 0, 7, 0, 1, 2)], "groups asked"),
        ([], [(0, kv.stride, 0, 9, 0, 0, 2)], "outside of the"),
        ([], [(-1, kv.stride, 0, 7, 0, 0, 2)], "outside of the"),
        ([], [(1, kv.stride, 0, 7, 0, 0, 2)], "outside of the"),
        ([], [(0, -kv.stride, 0, 7, 0, 0, 2)], "outside of the"),
        ([], [(0, 2 * kv.stride, 0, 7, 0, 0, 2)], "outside of the"),
        ([], [(0, kv.stride, -1, 7, 0, 0, 2)], "outside of the"),
        ([], [(0, kv.stride, 0, -1, 0, 0, 2)], "outside of the"),
        ([], [(0, kv.stride, 2**31 - 1, 7, 0, 0, 2)], "outside of the"),
    ]
    for work, runs, match in cases:
        with refused(match):
            cpu.plan(
                Rows.of(work), Segments.of(runs), kv.memory, kv.layout, SPEC, positions=torch.tensor([9, 9])
            )


def test_plans_of_other_shapes_are_refused(store_tokens):
    kv = store_tokens(SPEC, KVFormat.FLOAT32, 7, block_tokens=4)
    good = dict(
        rows=Rows.of([(0, 1, 0, 0, 2)]),
        segments=Segments.of([(0, kv.stride, 0, 7, 0, 0, 2)]),
        memory=kv.memory,
        layout=kv.layout,
        spec=SPEC,
    )
    wide = KVLayout.of(SPEC._replace(k_dim=65), layers=2, format=KVFormat.FLOAT32)
    cases = [
        (dict(layout=wide), "does not hold"),
        (dict(layout=kv.layout._replace(format=KVFormat.FLOAT64)), "float64"),
        (dict(layout=kv.layout._replace(v_in_k=True)), "does not hold"),
        (dict(memory=kv.memory.view(torch.float32)), "contiguous bytes"),
        (dict(memory=kv.memory[::2]), "contiguous bytes"),
        (dict(memory=kv.memory.to("meta")), "contiguous bytes"),
        (dict(rows=Rows(*(field.long() for field in good["rows"]))), "Rows: torch.int64"),
        (dict(segments=Segments(*(field.int() for field in good["segments"]))), "Segments: torch.int32"),
        (dict(rows=Rows(*(field.expand(3) for field in good["rows"]))), "Rows"),
        (dict(rows=good["rows"]._replace(row=torch.zeros(2, dtype=torch.int32))), "Rows"),
        (dict(spec=SPEC._replace(q_heads=3)), "do not divide evenly"),
        (dict(spec=SPEC._replace(q_heads=0)), "do not divide evenly"),
        (dict(spec=SPEC._replace(window_tokens=0)), "a window of 0"),
        (dict(spec=SPEC._replace(soft_cap=0.0)), "above 0"),
        (dict(spec=SPEC._replace(scale=-1.0)), "above 0"),
        (dict(group0=1, group1=3), "groups 1..3 of 2"),
        (dict(group0=-1), "groups -1..2 of 2"),
    ]
    for change, match in cases:
        with refused(match):
            cpu.plan(**{**good, **change}, positions=torch.tensor([9, 9]))


@pytest.mark.parametrize("number", [2**31, 2**32, 2**32 + 1, -(2**31) - 1])
def test_a_number_that_32_bits_cannot_hold_is_refused(stored, number):
    """And not cut to what they can: 2^32 would be nothing, and 2^32 + 1 one."""
    with refused("does not fit into 32 bits"):
        whole(stored, threads=number)
    q, out = queries(), State.identity(2, 4, 64)
    k = v = torch.zeros(2, 1, 64)
    with refused("does not fit into 32 bits"):
        cpu.extend(q, k, v, SPEC, q_positions=torch.tensor([9, 9]), k_position=0, out=out, threads=number)


def test_calls_of_other_shapes_are_refused(stored):
    plan, q, out = whole(stored), queries(), State.identity(2, 4, 64)
    for layer in (-1, 2):
        with refused(f"layer {layer} of 2"):
            cpu.partial(plan, layer, q, out=out)
    cases = [
        (q[:1], out, "q of shape"),
        (q[..., :63], out, "q of shape"),
        (q.double(), out, "float64"),
        (q.to("meta"), out, "meta"),
        (q.transpose(0, 2).contiguous().transpose(0, 2), out, "contiguous"),
        (q, State.identity(1, 4, 64), "o of shape"),
        (q, out._replace(o=out.o.double()), "float64"),
        (q, out._replace(lse=out.lse.double()), "lse: torch.float64|lse must be"),
        (q, out._replace(lse=out.lse[:, :3]), "lse of shape"),
        (q, out._replace(o=out.o[..., ::2]), "o of shape"),
    ]
    for q_given, out_given, match in cases:
        with refused(match):
            cpu.partial(plan, 1, q_given, out=out_given)


@pytest.mark.parametrize("between", ["nothing", "another call", "another offer"])
def test_what_is_offered_is_done_when_it_is_complete(stored, between):
    """By whichever thread, once, and whatever its own thread does before it asks."""
    plan, other = whole(stored, threads=2), whole(stored, threads=3)
    q, q_other = queries(), queries(seed=1)
    expected, expected_other = run(plan, q), run(other, q_other)
    for _ in range(50):
        out, out_other = (State(torch.full((2, 4, 64), 7.0), torch.full((2, 4), 7.0)) for _ in range(2))
        cpu.offer(plan, 1, q, out=out)
        if between == "another call":
            cpu.partial(other, 1, q_other, out=out_other)
        elif between == "another offer":
            cpu.offer(other, 1, q_other, out=out_other)
        cpu.complete()
        assert torch.equal(out.o, expected.o) and torch.equal(out.lse, expected.lse)
        if between != "nothing":
            assert torch.equal(out_other.o, expected_other.o)
    cpu.complete()  # nothing was offered


def test_threads_that_offer_at_once_do_not_meet(stored):
    """One has the pool until it completes; the others compute at once."""

    def caller(seed):
        plan, q = whole(stored, threads=2), queries(seed=seed)
        expected, out = run(plan, q), State.identity(2, 4, 64)
        for _ in range(100):
            out.o.fill_(7.0)
            cpu.offer(plan, 1, q, out=out)
            cpu.complete()
            assert torch.equal(out.o, expected.o)

    with ThreadPoolExecutor(4) as callers:
        list(callers.map(caller, range(4)))


def test_a_mistake_is_refused_when_it_is_offered(stored):
    plan, out = whole(stored), State.identity(2, 4, 64)
    with refused("q of shape"):
        cpu.offer(plan, 1, queries(rows=1), out=out)
    with pytest.raises(ValueError, match="layer 9"):
        cpu.offer(plan, 9, queries(), out=out)
    cpu.complete()


def test_tensors_are_read_through_python_where_torch_has_no_table(stored):
    """torch before 2.10 or so: slower, and the same in everything else."""
    plan, q, out, expected = whole(stored), queries(), State.identity(2, 4, 64), State.identity(2, 4, 64)
    cpu.partial(plan, 1, q, out=expected)
    api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    cpu._native.use_tensors(torch.Tensor, None, cpu._describe)
    try:
        cpu.partial(plan, 1, q, out=out)
        for other in (q.double(), q.to("meta"), q[:1], q[0, 0, None, None, None], None):
            with refused("q"):
                cpu.partial(plan, 1, other, out=out)
    finally:
        cpu._native.use_tensors(torch.Tensor, api, cpu._describe)
    assert torch.equal(out.o, expected.o) and torch.equal(out.lse, expected.lse)


EXHAUST = """
import resource
import torch
from farshore.kernels import cpu
from farshore.kernels.base import AttentionSpec, State

spec = AttentionSpec(1, 1, 1, 16384, 16384, 1.0)
x = torch.zeros(2048, 1, 16384)
out = State.identity(2048, 1, 16384)
warm = AttentionSpec(1, 1, 1, 64, 64, 1.0)
y = torch.zeros(2048, 1, 64)
positions = torch.arange(2048)
call = dict(q_positions=positions, k_position=0, threads=2)
small = State.identity(2048, 1, 64)
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
def test_scratch_that_cannot_be_had_is_an_error_of_the_call(tmp_path):
    """Not the end of the process, whichever thread wants it; and the next call works."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", EXHAUST], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


NO_THREADS = """
import resource
import torch
from farshore.kernels import cpu
from farshore.kernels.base import AttentionSpec, State

torch.set_num_threads(1)  # its own pool ends the process where there are no threads
spec = AttentionSpec(1, 1, 1, 64, 64, 1.0)
y = torch.randn(2048, 1, 64)
out, again = State.identity(2048, 1, 64), State.identity(2048, 1, 64)
call = dict(q_positions=torch.arange(2048), k_position=0)
cpu.extend(y, y.view(1, 2048, 64), y.view(1, 2048, 64), spec, out=out, threads=1, **call)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), -1))  # less than a thread's stack
cpu.extend(y, y.view(1, 2048, 64), y.view(1, 2048, 64), spec, out=again, threads=8, **call)
assert torch.equal(out.o, again.o) and torch.equal(out.lse, again.lse)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures its own memory by /proc")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="asan takes the memory")
def test_threads_that_cannot_be_had_are_done_without(tmp_path):
    """A machine at its limit of threads, or of memory for their stacks, is slower and no error."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", NO_THREADS], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@every_instruction_set
@pytest.mark.parametrize("format", [KVFormat.INT8, KVFormat.INT4], ids=lambda it: it.value)
@pytest.mark.parametrize("rows", [1, 20])
def test_rows_of_many_scales(kernels, textbook, assert_close, store_tokens, format, rows):
    """Beyond 1,024 elements, with a last group that is short: few queries and many take different ways."""
    spec = AttentionSpec(1, 1, 1, 1100, 1100, 0.02)
    kv = store_tokens(spec, format, 9)
    q = torch.randn(rows, 1, 1100, generator=torch.Generator().manual_seed(0)).bfloat16()
    positions = torch.full((rows,), 9)
    segments = Segments.of([(0, kv.stride, 0, 9, 0, 0, 1)])
    plan = kernels.plan(
        Rows.of([(0, rows, 0, 0, 1)]), segments, kv.memory, kv.layout, spec, positions=positions
    )
    out = State.identity(rows, 1, 1100)
    kernels.partial(plan, 1, q, out=out)
    assert_close(
        out, textbook(q, kv.k, kv.v, spec, q_positions=positions), kernels.tolerance(q.dtype, format)
    )


def test_extensions_of_other_shapes_are_refused():
    q, k, v, out = (
        torch.zeros(2, 4, 64),
        torch.zeros(2, 5, 64),
        torch.zeros(2, 5, 64),
        State.identity(2, 4, 64),
    )
    good = dict(q=q, k=k, v=v, spec=SPEC, q_positions=torch.tensor([5, 6]), k_position=0, out=out)
    cases = [
        (dict(q=q[:, :3]), "do not match"),
        (dict(q=q[:, :2]), "do not match"),
        (dict(k=k[:1]), "do not match"),
        (dict(v=v[:, :4]), "do not match"),
        (dict(v=v[..., :32]), "do not match"),
        (dict(q_positions=torch.tensor([5])), "do not match"),
        (dict(v=v.half()), "v torch.float16"),
        (dict(k=k.double(), v=v.double()), "float64"),
        (dict(q=q.to(torch.int32)), "int32"),
        (dict(k=k.to("meta"), v=v.to("meta")), "meta"),
        (dict(out=State.identity(3, 4, 64)), "o of shape"),
        (dict(spec=SPEC._replace(window_tokens=-1)), "a window of -1"),
    ]
    for change, match in cases:
        with refused(match):
            cpu.extend(**{**good, **change})


def test_states_of_other_shapes_are_refused():
    state, out = State.identity(2, 4, 64), State.identity(2, 4, 64)
    with refused("no states"):
        cpu.merge([], out=out)
    with refused("a sink of"):
        cpu.merge([state], sink=torch.zeros(3), out=out)
    for other in (State.identity(2, 3, 64), State.identity(2, 4, 65), state._replace(o=state.o.long())):
        with refused("o of shape|int64"):
            cpu.merge([state, other], out=out)
