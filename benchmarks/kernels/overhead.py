"""The cost of calls that compute very little: ``merge``, and ``partial`` on single tokens.

Called by ``benchmark``. Both are called from Python once per layer of every step, so their time is latency.
"""

import torch

from farshore.benchmarks.kernels.cold import ColdKV, query
from farshore.benchmarks.kernels.implementation import Setting
from farshore.benchmarks.kernels.shapes import SMOLLM2
from farshore.benchmarks.report import Bar, Result
from farshore.benchmarks.timing import Timing, interleave
from farshore.kernels.base import State
from farshore.kernels.formats import KVFormat

ROWS = 16
STATES = 8
BAR_US = 10.0
"""The greatest time of a call."""


def merge(setting: Setting) -> tuple[list[Result], list[Bar]]:
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, SMOLLM2.q_heads, SMOLLM2.dim)
    states = [
        State(torch.randn(shape, generator=generator), torch.randn(shape[:2], generator=generator))
        for _ in range(STATES)
    ]
    out = State.identity(*shape, device="cpu")
    timed = interleave(
        {"merge": lambda: setting.implementation.merge(states, out=out)},
        rounds=setting.sizes.rounds,
        calls=setting.sizes.calls,
    )
    name = f"merge of {STATES} states x {ROWS} rows x {SMOLLM2.q_heads} heads x {SMOLLM2.dim}"
    return _result(name, timed["merge"])


def tiny_partial(setting: Setting) -> tuple[list[Result], list[Bar]]:
    kv = ColdKV(SMOLLM2, KVFormat.BFLOAT16, sequences=ROWS, tokens=1, layers=1)
    plan = kv.plan_separate(setting.implementation)
    q, out = query(SMOLLM2, ROWS)
    timed = interleave(
        {"partial": lambda: setting.implementation.partial(plan, 0, q, out=out)},
        rounds=setting.sizes.rounds,
        calls=setting.sizes.calls,
    )
    return _result(f"partial, {ROWS} rows of 1 token each, bfloat16, {SMOLLM2}", timed["partial"])


def _result(name: str, timing: Timing) -> tuple[list[Result], list[Bar]]:
    return [Result(name, timing)], [Bar.at_most(name, timing.median_s * 1e6, BAR_US, "µs")]
