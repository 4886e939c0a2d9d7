"""The arguments of the native kernels: wrong ones are refused, and rows may have many scales."""

import subprocess
import sys

import pytest
import torch

from farshore.kernels.base import AttentionSpec, KVLayout, Segments, State, WorkList
from farshore.kernels.formats import KVFormat

cpu = pytest.importorskip("farshore.kernels.cpu.attention", reason="the native kernels are not built here")
from farshore.kernels.cpu import native_module  # noqa: E402

every_instruction_set = pytest.mark.parametrize("kernels", cpu.instruction_sets, indirect=True)

SPEC = AttentionSpec(4, 2, 2, 64, 64, scale=0.125)


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
                WorkList.of(work),
                Segments.of(runs),
                kv.memory,
                kv.layout,
                SPEC,
                positions=torch.tensor([9, 9]),
            )


def test_plans_of_other_shapes_are_refused(store_tokens):
    kv = store_tokens(SPEC, KVFormat.FLOAT32, 7, block_tokens=4)
    good = dict(
        work=WorkList.of([(0, 1, 0, 0, 2)]),
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
        (dict(work=WorkList(*(field.long() for field in good["work"]))), "WorkList: torch.int64"),
        (dict(segments=Segments(*(field.int() for field in good["segments"]))), "Segments: torch.int32"),
        (dict(work=WorkList(*(field.expand(3) for field in good["work"]))), "WorkList"),
        (dict(work=good["work"]._replace(row=torch.zeros(2, dtype=torch.int32))), "WorkList"),
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
def test_a_number_that_32_bits_cannot_hold_is_refused(sequence, number):
    """A number cut to 32 bits would pass: 2^32 as 0, and 2^32 + 1 as 1."""
    with refused("does not fit into 32 bits"):
        sequence.plan(threads=number)
    q, out = sequence.queries(), State.identity(2, 4, 64, device="cpu")
    k = v = torch.zeros(2, 1, 64)
    with refused("does not fit into 32 bits"):
        cpu.extend(q, k, v, SPEC, q_positions=torch.tensor([9, 9]), k_position=0, out=out, threads=number)


def test_calls_of_other_shapes_are_refused(sequence):
    plan, q, out = sequence.plan(), sequence.queries(), State.identity(2, 4, 64, device="cpu")
    for layer in (-1, 2):
        with refused(f"layer {layer} of 2"):
            cpu.partial(plan, layer, q, out=out)
    cases = [
        (q[:1], out, "q of shape"),
        (q[..., :63], out, "q of shape"),
        (q.double(), out, "float64"),
        (q.to("meta"), out, "meta"),
        (q.transpose(0, 2).contiguous().transpose(0, 2), out, "contiguous"),
        (q, State.identity(1, 4, 64, device="cpu"), "o of shape"),
        (q, out._replace(o=out.o.double()), "float64"),
        (q, out._replace(lse=out.lse.double()), "lse: torch.float64|lse must be"),
        (q, out._replace(lse=out.lse[:, :3]), "lse of shape"),
        (q, out._replace(o=out.o[..., ::2]), "o of shape"),
    ]
    for q_given, out_given, match in cases:
        with refused(match):
            cpu.partial(plan, 1, q_given, out=out_given)


def test_an_asynchronous_call_checks_at_once(sequence):
    plan, out = sequence.plan(), State.identity(2, 4, 64, device="cpu")
    with refused("q of shape"):
        cpu.partial_async(plan, 1, sequence.queries(rows=1), out=out)
    with pytest.raises(ValueError, match="layer 9"):
        cpu.partial_async(plan, 9, sequence.queries(), out=out)
    cpu.wait()


def test_tensors_are_read_through_python_without_torchs_table(sequence):
    """torch before 2.10 or so has no C table; the results and errors are the same."""
    plan, q, out, expected = (
        sequence.plan(),
        sequence.queries(),
        State.identity(2, 4, 64, device="cpu"),
        State.identity(2, 4, 64, device="cpu"),
    )
    cpu.partial(plan, 1, q, out=expected)
    api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    cpu._native.use_tensors(torch.Tensor, None, native_module.describe)
    try:
        cpu.partial(plan, 1, q, out=out)
        for other in (q.double(), q.to("meta"), q[:1], q[0, 0, None, None, None], None):
            with refused("q"):
                cpu.partial(plan, 1, other, out=out)
    finally:
        cpu._native.use_tensors(torch.Tensor, api, native_module.describe)
    assert torch.equal(out.o, expected.o) and torch.equal(out.lse, expected.lse)


def test_extensions_of_other_shapes_are_refused():
    q, k, v, out = (
        torch.zeros(2, 4, 64),
        torch.zeros(2, 5, 64),
        torch.zeros(2, 5, 64),
        State.identity(2, 4, 64, device="cpu"),
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
        (dict(out=State.identity(3, 4, 64, device="cpu")), "o of shape"),
        (dict(spec=SPEC._replace(window_tokens=-1)), "a window of -1"),
    ]
    for change, match in cases:
        with refused(match):
            cpu.extend(**{**good, **change})


def test_states_of_other_shapes_are_refused():
    state, out = State.identity(2, 4, 64, device="cpu"), State.identity(2, 4, 64, device="cpu")
    with refused("no states"):
        cpu.merge([], out=out)
    with refused("a sink of"):
        cpu.merge([state], sink=torch.zeros(3), out=out)
    for other in (
        State.identity(2, 3, 64, device="cpu"),
        State.identity(2, 4, 65, device="cpu"),
        state._replace(o=state.o.long()),
    ):
        with refused("o of shape|int64"):
            cpu.merge([state, other], out=out)


@every_instruction_set
@pytest.mark.parametrize("format", [KVFormat.INT8, KVFormat.INT4], ids=lambda format: format.value)
@pytest.mark.parametrize("rows", [1, 20])
def test_rows_with_many_scales(kernels, textbook, assert_close, store_tokens, format, rows):
    """More than 1,024 elements and a short last group; few and many queries run different code."""
    spec = AttentionSpec(1, 1, 1, 1100, 1100, 0.02)
    kv = store_tokens(spec, format, 9)
    q = torch.randn(rows, 1, 1100, generator=torch.Generator().manual_seed(0)).bfloat16()
    positions = torch.full((rows,), 9)
    segments = Segments.of([(0, kv.stride, 0, 9, 0, 0, 1)])
    plan = kernels.plan(
        WorkList.of([(0, rows, 0, 0, 1)]), segments, kv.memory, kv.layout, spec, positions=positions
    )
    out = State.identity(rows, 1, 1100, device="cpu")
    kernels.partial(plan, 1, q, out=out)
    assert_close(
        out, textbook(q, kv.k, kv.v, spec, q_positions=positions), kernels.tolerance(q.dtype, format)
    )


@pytest.mark.parametrize("module", ["attention", "dense", "packed"])
def test_each_module_alone_makes_natives_read_tensors(module):
    """In a process of its own: importing one module must not depend on another one's import."""
    use = (
        f"import torch, farshore.kernels.cpu.{module} as module\n"
        "blocks, values = torch.zeros(2, 1, 34, dtype=torch.uint8), torch.ones(2, 32)\n"
        "module._native.dense_dequantise(2, blocks, values, 1)\n"
        "assert not values.any()"
    )
    subprocess.run([sys.executable, "-P", "-c", use], check=True, timeout=60)
