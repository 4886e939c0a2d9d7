"""Every GPU kernel against the reference in float64, on the device that it runs on.

Called by ``sections``. The cases are those of tests/kernels/gpu/test_attention.py, which has its precisions
and tolerances from here: every head dim, grouped and latent attention, formats, caps and windows, lengths
around blocks and tiles, shared and empty segments. The checks run in several processes. It must not know the
engine.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from farshore.benchmarks.cases import Measured
from farshore.benchmarks.gpu.process import end_with_input, failed
from farshore.benchmarks.gpu.setting import Setting, Sizes
from farshore.benchmarks.report import Bar
from farshore.kernels import reference
from farshore.kernels.base import AttentionSpec, KVLayout, Segments, State, WorkList
from farshore.kernels.formats import KVFormat, quantise

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 8e-3}
"""By the dtype of products: the error of o over the largest |V|, and of lse."""
PRECISIONS = (
    (torch.float32, KVFormat.FLOAT32),
    (torch.bfloat16, KVFormat.BFLOAT16),
    (torch.float16, KVFormat.FLOAT16),
    (torch.float32, KVFormat.BFLOAT16),
    (torch.float32, KVFormat.INT8),
    (torch.bfloat16, KVFormat.INT8),
    (torch.float32, KVFormat.INT4),
    (torch.bfloat16, KVFormat.INT4),
)
"""(dtype of q, format of KV)"""
MERGED = (2, 1, 16, 17, 65)
"""States that are merged; a launch takes 16."""
BLOCK_TOKENS = 32
K_POSITION = 10


class Case(NamedTuple):
    spec: AttentionSpec
    lengths: tuple[int, ...]
    """Tokens of the pieces into which the sequence is cut."""
    rows: int
    first: int = 0
    """Slot of token 0 in its block."""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def cases() -> Iterator[Case]:
    for dim in (64, 80, 96, 112, 128, 192, 256):
        yield Case(_spec(4, 1, dim, min(dim, 128)), (33,), 2, first=7)
    for dims in ((576, 512), (192, 64)):
        yield Case(_spec(40, 1, *dims)._replace(v_in_k=True), (19,), 2, first=5)
    for tokens in (0, 1, 15, 16, 17, 63, 64, 65, 300):
        yield Case(_spec(6, 2, 64, 64), (tokens,), 3)
    for spec in (
        _spec(9, 3, 64, 64),
        _spec(32, 8, 128, 128),
        _spec(8, 8, 20, 12),
        AttentionSpec(12, 2, 3, 80, 64, scale=0.1),
    ):
        yield Case(spec, (37, 0, 90), 5, first=11)
        yield Case(spec._replace(soft_cap=5.0), (70,), 5)
        yield Case(spec._replace(window_tokens=20), (70, 3), 40)


def _spec(q_heads: int, kv_heads: int, k_dim: int, v_dim: int) -> AttentionSpec:
    return AttentionSpec(q_heads, kv_heads, kv_heads, k_dim, v_dim, scale=k_dim**-0.5)


Check = tuple[str, Callable[[Setting], float]]
"""The name of a bar, and a function that computes an error as a multiple of the tolerance."""
Checked = tuple[str, float, str]
"""The name of a bar; the error as a multiple of the tolerance; why it could not be computed."""


def measure(setting: Setting) -> Measured:
    """One bar for each kernel and precision: the worst error of all cases."""
    worst: dict[str, float | None] = dict.fromkeys(name for name, _ in _checks(setting.sizes.every_case))
    errors: dict[str, str] = {}
    for name, value, error in _in_processes(setting):
        worst[name] = max(worst.get(name) or 0.0, value)
        if error:
            errors.setdefault(name, error)
    return [], [
        failed(name, errors[name])
        if name in errors
        else Bar.at_most(name, value, 1.0, "of the tolerance", "worst error against float64")
        for name, value in worst.items()
    ]


def _checks(every_case: int) -> list[Check]:
    """Every kernel in every precision, on every n-th case."""
    listed = list(cases())[::every_case]
    # Latent attention stores no V; prefill has it as a tensor of its own.
    with_v = [case for case in listed if not case.spec.v_in_k]
    found: list[Check] = []
    for dtype, format in PRECISIONS:
        name = f"partial, q {_name(dtype)}, KV {format.value}"
        found += [(name, partial(_partial, case=case, dtype=dtype, format=format)) for case in listed]
    for dtype in TOLERANCE:
        found += [(f"extend, {_name(dtype)}", partial(_extend, case=case, dtype=dtype)) for case in with_v]
        counts = MERGED[::every_case]
        found += [(f"merge, {_name(dtype)}", partial(_merge, count=count, dtype=dtype)) for count in counts]
    return found


def _checked(setting: Setting, name: str, error_of: Callable[[Setting], float]) -> Checked:
    try:
        with torch.inference_mode():
            return name, error_of(setting), ""
    except Exception as error:
        return name, 0.0, f"{type(error).__name__}: {error}".splitlines()[0]


def _in_processes(setting: Setting) -> Iterator[Checked]:
    """Deals the checks out to processes. Nearly all of their time goes to triton's compiler, which keeps one
    core busy: more than two minutes of it."""
    sizes, pipe = setting.sizes, subprocess.PIPE
    with ExitStack() as stack:
        children = []
        for number in range(sizes.check_processes):
            dealt = map(str, (setting.device, number, sizes.check_processes, sizes.every_case))
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "farshore.benchmarks.gpu.correctness", *dealt],
                stdin=pipe,
                stdout=pipe,
                text=True,
            )
            children.append(stack.enter_context(child))
            stack.callback(child.kill)
        for number, child in enumerate(children):
            assert child.stdout is not None
            for line in child.stdout:
                yield tuple(json.loads(line))
            if child.wait():
                yield f"process {number} of the kernels' checks", 0.0, f"ended with {child.returncode}"


def main(device: str, number: str, processes: str, every_case: str) -> None:
    """Prints what one of the processes found, one :data:`Checked` per line."""
    end_with_input()
    torch.set_num_threads(1)
    setting = Setting(torch.device(device), Sizes(), folder=None, progress=lambda _: None)
    for check in _checks(int(every_case))[int(number) :: int(processes)]:
        print(json.dumps(_checked(setting, *check)), flush=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _random(setting: Setting, *shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator(device="cpu").manual_seed(seed), device="cpu")
    return made.to(setting.device, dtype)


def _unwritten(rows: int, spec: AttentionSpec, setting: Setting) -> State:
    """A state of NaN, so that an element that a kernel does not write is noticed."""
    state = State.identity(rows, spec.q_heads, spec.v_dim, device=setting.device)
    return State(state.o.fill_(torch.nan), state.lse.fill_(torch.nan))


def _error(found: State, expected: State, largest_v: float, largest_logit: float) -> float:
    """The error of o over the largest |V|, or of lse over the largest |logit| if that is above 1. Infinite if
    a value is no number where it should be one, or the other way."""
    same = torch.equal(found.lse.isfinite(), expected.lse.isfinite()) and not found.o.isnan().any()
    if not same or found.lse.isnan().any():
        return float("inf")
    seen = expected.lse.isfinite()
    o_error = (found.o.double() - expected.o.double()).abs().max().item() if found.o.numel() else 0.0
    lse_error = (found.lse.double() - expected.lse.double())[seen].abs()
    lse_errors = lse_error.max().item() if lse_error.numel() else 0.0
    return max(o_error / max(largest_v, 1e-9), lse_errors / max(largest_logit, 1.0))


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _largest_logit(spec: AttentionSpec, q: Tensor, k: Tensor) -> float:
    by_k_head = q.double().unflatten(1, (spec.k_heads, -1)).transpose(0, 1).flatten(1, 2)
    return _largest(by_k_head @ k.double().transpose(1, 2)) * spec.scale


def _stored(setting: Setting, case: Case, format: KVFormat) -> tuple[KVLayout, Tensor, Tensor, Tensor]:
    """(layout, memory, K, V): random tokens in layer 1 of 2. All other bytes are 0xFF, which is NaN in every
    float format and scale."""
    spec = case.spec
    layout = KVLayout.of(spec, layers=2, format=format)._replace(block_tokens=BLOCK_TOKENS)
    blocks = max(-(-(case.first + case.tokens) // BLOCK_TOKENS), 1)
    memory = torch.full((blocks * layout.block_bytes,), 0xFF, dtype=torch.uint8, device=setting.device)
    k = _random(setting, spec.k_heads, case.tokens, spec.k_dim, seed=1)
    v = (
        k[..., : spec.v_dim]
        if spec.v_in_k
        else _random(setting, spec.v_heads, case.tokens, spec.v_dim, seed=2)
    )
    for number in range(blocks):
        view = layout.stored(memory[number * layout.block_bytes :][: layout.block_bytes], 1)
        begin = max(number * BLOCK_TOKENS - case.first, 0)
        end = min((number + 1) * BLOCK_TOKENS - case.first, case.tokens)
        slots = slice(begin + case.first - number * BLOCK_TOKENS, end + case.first - number * BLOCK_TOKENS)
        for rows, payload, scales in ((k, view.k, view.k_scales), (v, view.v, view.v_scales)):
            quantised = quantise(rows[:, begin:end], format)
            payload[:, slots], scales[:, slots] = quantised[0].view(payload[:, slots].shape), quantised[1]
    return layout, memory, k, v


def _partial(setting: Setting, case: Case, dtype: torch.dtype, format: KVFormat) -> float:
    spec = case.spec
    layout, memory, k, v = _stored(setting, case, format)
    begins = [sum(case.lengths[:i]) for i in range(len(case.lengths))]
    segments = Segments.of(
        [
            (0, layout.block_bytes, case.first + begin, length, K_POSITION + begin, 0, spec.groups)
            for begin, length in zip(begins, case.lengths, strict=True)
        ]
    )
    work = WorkList.of([(0, case.rows, i, 0, spec.groups) for i in range(len(case.lengths))])
    positions = torch.arange(case.rows, device="cpu") + K_POSITION + max(case.tokens - 3, 0)
    q = _random(setting, case.rows, spec.q_heads, spec.k_dim, seed=3, dtype=dtype)
    found, expected = _unwritten(case.rows, spec, setting), None
    for kernels, queries in ((setting.kernels, q), (reference, q.double())):
        on = positions.to(setting.device)
        plan = kernels.plan(work, segments, memory, layout, spec, positions=on)
        if kernels is reference:
            expected = State.identity(
                case.rows, spec.q_heads, spec.v_dim, dtype=torch.float64, device=setting.device
            )
        kernels.partial(plan, 1, queries, out=found if expected is None else expected)
    assert expected is not None
    return _error(found, expected, _largest(v), _largest_logit(spec, q, k)) / TOLERANCE[dtype]


def _extend(setting: Setting, case: Case, dtype: torch.dtype) -> float:
    spec = case.spec
    q = _random(setting, case.rows, spec.q_heads, spec.k_dim, seed=4, dtype=dtype)
    k = _random(setting, spec.k_heads, case.tokens, spec.k_dim, seed=5, dtype=dtype)
    v = _random(setting, spec.v_heads, case.tokens, spec.v_dim, seed=6, dtype=dtype)
    positions = torch.arange(case.rows, device=setting.device) + K_POSITION + max(case.tokens - 3, 0)
    found = _unwritten(case.rows, spec, setting)
    expected = State.identity(case.rows, spec.q_heads, spec.v_dim, dtype=torch.float64, device=setting.device)
    for extend, tensors, out in (
        (setting.kernels.extend, (q, k, v), found),
        (reference.extend, (q.double(), k.double(), v.double()), expected),
    ):
        extend(*tensors, spec, q_positions=positions, k_position=K_POSITION, out=out)
    return _error(found, expected, _largest(v), _largest_logit(spec, q, k)) / TOLERANCE[dtype]


def _merge(setting: Setting, count: int, dtype: torch.dtype) -> float:
    """Some states are empty, with an o of NaN."""
    spec = _spec(5, 5, 64, 64)
    states = []
    for number in range(count):
        o = _random(setting, 3, 5, 64, seed=number, dtype=dtype)
        lse = _random(setting, 5, 3, seed=number).T * 5
        empty = _random(setting, 3, 5, seed=number + 1) < (-0.5, 0.9)[number % 2]
        o[empty], lse[empty] = torch.nan, -torch.inf
        states.append(State(o, lse))
    sink = _random(setting, 5, seed=count)
    found = _unwritten(3, spec, setting)
    expected = State.identity(3, 5, 64, dtype=torch.float64, device=setting.device)
    setting.kernels.merge(states, sink=sink, out=found)
    wide = [State(state.o.double(), state.lse.double()) for state in states]
    reference.merge(wide, sink=sink.double(), out=expected)
    return _error(found, expected, 1.0, 1.0) / TOLERANCE[dtype]


if __name__ == "__main__":
    main(*sys.argv[1:])
