"""Requests to the local engine: decode, prefill, many sequences, and decodes beside a prefill.

Called by ``serve``, which holds what this measures against bars.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from random import Random
from statistics import median, quantiles

from farshore.benchmarks.report import Result
from farshore.benchmarks.serve.engine import LocalEngine, Request
from farshore.benchmarks.serve.setting import Limits, Setting, prefill_flops, step_bytes
from farshore.benchmarks.timing import Timing
from farshore.kernels.base import BLOCK_TOKENS

SKIPPED_TOKENS = 4
"""Of each sequence, before times count."""
MOST_PREFILLS = 5
BESIDE_CONTEXT = 128


def decode(at: Setting, context: int) -> Result:
    """One sequence. Of a long context the whole blocks are random KV, stored without prefilling it."""
    with _engine(at) as (engine, limits):
        prompt = _prompt(at, context, seed=context)
        stored = context // BLOCK_TOKENS * BLOCK_TOKENS if context > 4 * BLOCK_TOKENS else 0
        if stored:
            engine.store_prefix(prompt[:stored])
        request = engine.submit(prompt, max_tokens=at.sizes.decode_tokens + SKIPPED_TOKENS).wait()
    gaps = Timing(request.gaps_s(skip=SKIPPED_TOKENS - 1))
    size = step_bytes(at.model, [context])
    figures = {
        "ms_per_token": gaps.median_s * 1e3,
        "context_stored_without_prefill_tokens": stored,
        **_of_bytes(size, gaps.median_s, limits()),
    }
    return Result(f"decode at {context}", gaps, figures)


def prefill(at: Setting, context: int) -> Result:
    """Prompts one after the other, none of which begins like another; until the first token. Once where that
    takes long, up to five times else."""
    times_s: list[float] = []
    with _engine(at) as (engine, limits):
        engine.submit(_prompt(at, min(context, BLOCK_TOKENS), seed=-1), max_tokens=1).wait()
        while not times_s or (
            len(times_s) < MOST_PREFILLS and sum(times_s) + max(times_s) < at.sizes.prefill_most_s
        ):
            prompt = _prompt(at, context, seed=len(times_s))
            request = engine.submit(prompt, max_tokens=1).wait()
            times_s.append(request.first_token_s)
            at.prefilled_s |= request.prefilled_s
    timing = Timing(tuple(times_s))
    figures = {
        "tokens_per_s": context / timing.median_s,
        **_of_flops(prefill_flops(at.model.config, context), timing.median_s, limits()),
    }
    return Result(f"prefill of {context}", timing, figures)


def together(at: Setting) -> Result:
    """Sequences of different contexts, stored without prefilling them, decoded at once: tokens of all of them
    while all of them run."""
    sizes = at.sizes
    with _engine(at) as (engine, limits):
        prompts = [_prompt(at, sizes.together_context, seed=i) for i in range(sizes.sequences)]
        for prompt in prompts:
            engine.store_prefix(prompt[:-BLOCK_TOKENS])
        # The first ones run while the last ones' prompts end.
        most = sizes.together_tokens * 2
        requests = [engine.submit(prompt, max_tokens=most) for prompt in prompts]
        for request in requests:
            request.wait()
    begin_s = max(request.token_s[SKIPPED_TOKENS] for request in requests)
    end_s = min(request.token_s[-1] for request in requests)
    inside = sum(begin_s < token_s <= end_s for request in requests for token_s in request.token_s)
    steps = Timing(
        tuple(b - a for a, b in pairwise([t for t in requests[-1].token_s if begin_s <= t <= end_s]))
    )
    size = step_bytes(at.model, [sizes.together_context] * sizes.sequences)
    figures = {
        "tokens_per_s": inside / (end_s - begin_s),
        **_of_bytes(size, steps.median_s, limits()),
    }
    return Result(f"{sizes.sequences} sequences at {sizes.together_context}", steps, figures)


def beside(at: Setting) -> Result:
    """Running decodes while a long prompt is prefilled, and what that takes longer than alone.

    Alone: as the beginning of a longer prompt took it, where one was prefilled before in this run. Decode
    time given away: the steps that ran meanwhile, at what a step takes without a prefill."""
    sizes = at.sizes
    with _engine(at) as (engine, limits):
        alone_s = at.prefilled_s.get(sizes.beside_context)
        alone_from = "a longer prompt's beginning"
        if alone_s is None:
            prompt = _prompt(at, sizes.beside_context, seed=1)
            alone_s, alone_from = engine.submit(prompt, max_tokens=1).wait().first_token_s, "its own run"
        at.progress(f"a prompt of {sizes.beside_context} alone took {alone_s:.1f} s; now beside decodes")
        running = [
            engine.submit(_prompt(at, BESIDE_CONTEXT, seed=10 + i), max_tokens=sizes.beside_tokens)
            for i in range(sizes.beside_decodes)
        ]
        for request in running:
            request.wait(SKIPPED_TOKENS + sizes.together_tokens)
        step_s = median(running[-1].gaps_s(skip=SKIPPED_TOKENS))
        long = engine.submit(_prompt(at, sizes.beside_context, seed=2), max_tokens=1).wait()
        for request in running:
            request.cancel()
            request.wait()
    gaps = [gap for request in running for gap in _gaps_within(request, long.submitted_s, long.token_s[0])]
    given_away_s = step_s * len(gaps) / len(running)
    figures = {
        "p99_gap_ms": quantiles(gaps, n=100, method="inclusive")[-1] * 1e3,
        "prefill_alone_s": alone_s,
        "alone_from": alone_from,
        "prefill_beside_s": long.first_token_s,
        "step_without_prefill_ms": step_s * 1e3,
        "decode_given_away_s": given_away_s,
        "times_alone_and_given_away": long.first_token_s / (alone_s + given_away_s),
        **_of_flops(prefill_flops(at.model.config, sizes.beside_context), alone_s, limits()),
    }
    return Result(f"decode beside a prefill of {sizes.beside_context}", Timing(tuple(gaps)), figures)


@contextmanager
def _engine(at: Setting) -> Iterator[tuple[LocalEngine, "_Beside"]]:
    """An engine, and what gives the machine's limits: those from before and after, averaged."""
    model = at.model
    before = at.limits()
    with LocalEngine(model, kv_bytes=at.sizes.kv_bytes) as engine:
        yield engine, _Beside(at, before)


class _Beside:
    def __init__(self, at: Setting, before: Limits) -> None:
        self._at, self._before = at, before

    def __call__(self) -> Limits:
        after = self._at.limits()
        return Limits(
            (self._before.read_gbps + after.read_gbps) / 2,
            (self._before.gemm_gflops + after.gemm_gflops) / 2,
        )


def _of_bytes(size: int, seconds: float, limits: Limits) -> dict[str, float]:
    limit_s = size / limits.read_gbps / 1e9
    return {
        "read_gbps": limits.read_gbps,
        "step_mbytes": size / 1e6,
        "limit_ms": limit_s * 1e3,
        "times_limit": seconds / limit_s,
    }


def _of_flops(flops: int, seconds: float, limits: Limits) -> dict[str, float]:
    limit_s = flops / limits.gemm_gflops / 1e9
    return {
        "gemm_gflops": limits.gemm_gflops,
        "gflop": flops / 1e9,
        "limit_s": limit_s,
        "times_limit": seconds / limit_s,
    }


def _prompt(at: Setting, tokens: int, *, seed: int) -> list[int]:
    random = Random(seed)
    return [random.randrange(at.model.config.vocab) for _ in range(tokens)]


def _gaps_within(request: Request, begin_s: float, end_s: float) -> list[float]:
    """Of the gaps that reach into the time from ``begin_s`` to ``end_s``."""
    return [b - a for a, b in pairwise(request.token_s) if b > begin_s and a < end_s]
