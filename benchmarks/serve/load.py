"""Measures requests to the local engine: decode, prefill, concurrent decodes, and decodes during a prefill.

Called by ``benchmark``, which compares the results with bars.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from random import Random
from statistics import median, quantiles

from farshore.benchmarks.report import Result
from farshore.benchmarks.serve.engine import LocalEngine, Request
from farshore.benchmarks.serve.setting import Limits, Setting, Sizes, prefill_flops, step_bytes
from farshore.benchmarks.timing import Timing
from farshore.kernels.base import BLOCK_TOKENS

SKIPPED_TOKENS = 4
"""The first tokens of each sequence, whose times are not counted."""
MOST_PREFILLS = 5
BESIDE_CONTEXT = 128
"""Prompt tokens of the sequences that are decoded during a prefill."""


def decode(setting: Setting, context: int) -> Result:
    """Decodes one sequence. The full blocks of a long context are random KV that is stored, not prefilled."""
    with _engine(setting) as (engine, limits):
        prompt = _prompt(setting, context, seed=context)
        stored = context // BLOCK_TOKENS * BLOCK_TOKENS if context > 4 * BLOCK_TOKENS else 0
        if stored:
            engine.store_prefix(prompt[:stored])
        request = engine.submit(prompt, max_tokens=setting.sizes.decode_tokens + SKIPPED_TOKENS).wait()
    gaps = Timing(request.gaps_s(skip=SKIPPED_TOKENS - 1))
    size = step_bytes(setting.model, [context])
    figures = {
        "ms_per_token": gaps.median_s * 1e3,
        "context_stored_without_prefill_tokens": stored,
        **_against_bandwidth(size, gaps.median_s, limits()),
    }
    return Result(f"decode at {context}", gaps, figures)


def prefill(setting: Setting, context: int) -> Result:
    """Prefills prompts with different beginnings, one after the other, each until its first token: up to
    MOST_PREFILLS of them within ``prefill_most_s``."""
    times_s: list[float] = []
    with _engine(setting) as (engine, limits):
        engine.submit(_prompt(setting, min(context, BLOCK_TOKENS), seed=-1), max_tokens=1).wait()
        while not times_s or (
            len(times_s) < MOST_PREFILLS and sum(times_s) + max(times_s) < setting.sizes.prefill_most_s
        ):
            prompt = _prompt(setting, context, seed=len(times_s))
            request = engine.submit(prompt, max_tokens=1).wait()
            times_s.append(request.first_token_s)
            setting.prefilled_s |= request.prefilled_s
    timing = Timing(tuple(times_s))
    figures = {
        "tokens_per_s": context / timing.median_s,
        **_against_gemm_rate(prefill_flops(setting.model.config, context), timing.median_s, limits()),
    }
    return Result(f"prefill of {context}", timing, figures)


def together(setting: Setting) -> Result:
    """Decodes sequences with different, stored contexts concurrently. Counts the tokens of all sequences in
    the time in which all of them run: from the latest first token that counts until each has
    ``together_tokens`` more."""
    sizes = setting.sizes
    with _engine(setting) as (engine, limits):
        prompts = [_prompt(setting, sizes.together_context, seed=i) for i in range(sizes.sequences)]
        for prompt in prompts:
            engine.store_prefix(prompt[:-BLOCK_TOKENS])
        # The first sequences run while the last prompts are completed.
        requests = [engine.submit(prompt, max_tokens=sizes.running_tokens) for prompt in prompts]
        for request in requests:
            request.wait(SKIPPED_TOKENS + 1)
        begin_s = max(request.token_s[SKIPPED_TOKENS] for request in requests)
        for request in requests:
            request.wait_after(begin_s, sizes.together_tokens)
        for request in requests:
            request.cancel()
            request.wait()
    end_s = min(request.token_s[-1] for request in requests)
    inside = sum(begin_s < token_s <= end_s for request in requests for token_s in request.token_s)
    steps = Timing(
        tuple(b - a for a, b in pairwise([t for t in requests[-1].token_s if begin_s <= t <= end_s]))
    )
    size = step_bytes(setting.model, [sizes.together_context] * sizes.sequences)
    figures: dict[str, float | None] = {"tokens_per_s": None}
    if len(steps.samples_s) and _were_ended(requests, sizes):
        figures = {
            "tokens_per_s": inside / (end_s - begin_s),
            **_against_bandwidth(size, steps.median_s, limits()),
        }
    return Result(f"{sizes.sequences} sequences at {sizes.together_context}", steps, figures)


def beside(setting: Setting) -> Result:
    """Decodes sequences while a long prompt is prefilled: the gaps between their tokens, and the prefill's
    time compared with its time alone plus the time of the decode steps that ran meanwhile.

    The time alone is that of an equally long beginning of a longer prompt, if this run has prefilled one. The
    decode steps' time is their number times the median of a step without a prefill."""
    sizes = setting.sizes
    with _engine(setting) as (engine, limits):
        alone_s = setting.prefilled_s.get(sizes.beside_context)
        alone_from = "a longer prompt's beginning"
        if alone_s is None:
            prompt = _prompt(setting, sizes.beside_context, seed=1)
            alone_s, alone_from = engine.submit(prompt, max_tokens=1).wait().first_token_s, "its own run"
        setting.progress(f"a prompt of {sizes.beside_context} alone took {alone_s:.1f} s; now beside decodes")
        running = [
            engine.submit(_prompt(setting, BESIDE_CONTEXT, seed=10 + i), max_tokens=sizes.running_tokens)
            for i in range(sizes.beside_decodes)
        ]
        for request in running:
            request.wait(SKIPPED_TOKENS + sizes.together_tokens)
        step_s = median(running[-1].gaps_s(skip=SKIPPED_TOKENS))
        long = engine.submit(_prompt(setting, sizes.beside_context, seed=2), max_tokens=1).wait()
        for request in running:
            request.cancel()
            request.wait()
    gaps = [gap for request in running for gap in _gaps_within(request, long.submitted_s, long.token_s[0])]
    given_away_s = step_s * len(gaps) / len(running)
    measured = len(gaps) > 1 and _were_ended(running, sizes)
    figures = {
        "p99_gap_ms": quantiles(gaps, n=100, method="inclusive")[-1] * 1e3 if measured else None,
        "prefill_alone_s": alone_s,
        "alone_from": alone_from,
        "prefill_beside_s": long.first_token_s,
        "step_without_prefill_ms": step_s * 1e3,
        "decode_given_away_s": given_away_s,
        "times_alone_and_given_away": long.first_token_s / (alone_s + given_away_s) if measured else None,
        **_against_gemm_rate(prefill_flops(setting.model.config, sizes.beside_context), alone_s, limits()),
    }
    return Result(f"decode beside a prefill of {sizes.beside_context}", Timing(tuple(gaps)), figures)


def _were_ended(requests: Sequence[Request], sizes: Sizes) -> bool:
    """Whether all requests ran until the measurement ended them: none had all its tokens before."""
    return all(len(request.token_s) < sizes.running_tokens for request in requests)


@contextmanager
def _engine(setting: Setting) -> Iterator[tuple[LocalEngine, Callable[[], Limits]]]:
    """Yields an engine, and a function for the machine's limits: the mean of those before the engine started
    and of those when it is called."""
    model = setting.model
    before = setting.limits()
    with LocalEngine(model, kv_bytes=setting.sizes.kv_bytes) as engine:
        yield engine, partial(_mean_limits, setting, before)


def _mean_limits(setting: Setting, before: Limits) -> Limits:
    after = setting.limits()
    return Limits(
        (before.read_gbps + after.read_gbps) / 2,
        (before.gemm_gflops + after.gemm_gflops) / 2,
    )


def _against_bandwidth(size: int, seconds: float, limits: Limits) -> dict[str, float]:
    limit_s = size / limits.read_gbps / 1e9
    return {
        "read_gbps": limits.read_gbps,
        "step_mbytes": size / 1e6,
        "limit_ms": limit_s * 1e3,
        "times_limit": seconds / limit_s,
    }


def _against_gemm_rate(flops: int, seconds: float, limits: Limits) -> dict[str, float]:
    limit_s = flops / limits.gemm_gflops / 1e9
    return {
        "gemm_gflops": limits.gemm_gflops,
        "gflop": flops / 1e9,
        "limit_s": limit_s,
        "times_limit": seconds / limit_s,
    }


def _prompt(setting: Setting, tokens: int, *, seed: int) -> list[int]:
    random = Random(seed)
    return [random.randrange(setting.model.config.vocab) for _ in range(tokens)]


def _gaps_within(request: Request, begin_s: float, end_s: float) -> list[float]:
    """Seconds between tokens, for the gaps that overlap the time from ``begin_s`` to ``end_s``."""
    return [b - a for a, b in pairwise(request.token_s) if b > begin_s and a < end_s]
