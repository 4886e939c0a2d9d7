"""How long a gateway takes to choose an engine among 64; the directory's look-up is not part of it.

Called by ``benchmark`` of this folder. Must not know how engines are found.
"""

import hashlib
import random
import time
from statistics import quantiles

from farshore.benchmarks.report import Bar, Result
from farshore.benchmarks.timing import Timing
from farshore.gateway.engines.router import Router
from farshore.gateway.requests.validate import Job

ENGINES = 64
CHOICES = 20_000
MOST_P99_US = 200.0


class _Engine:
    """As :class:`farshore.gateway.engines.known.KnownEngine` shows itself to the router."""

    def __init__(self, worker: str) -> None:
        self.worker = worker
        self.seed = int.from_bytes(hashlib.blake2b(worker.encode(), digest_size=8).digest())
        self.sent = self.running = self.others = 0
        self.problem: str | None = None

    @property
    def load(self) -> int:
        return self.running + self.others


def routing_bars() -> tuple[list[Result], list[Bar]]:
    """Choices for long prompts (every fourth begins with one common block) and for short ones, while requests
    begin and end."""
    draw = random.Random(7)
    engines = [_Engine(f"dense-{index}-{draw.getrandbits(24):06x}") for index in range(ENGINES)]
    router = Router(
        lambda: [engine for engine in engines if engine.problem is None], lambda: "no engine is left"
    )
    results = []
    bars = []
    for name in ("long prompts", "short prompts"):
        samples_s = _choose(router, engines, draw, short=name == "short prompts")
        p99_us = quantiles(samples_s, n=100)[-1] * 1e6
        results.append(Result(f"routing, {ENGINES} engines, {name}", Timing(samples_s), {"p99_us": p99_us}))
        bars.append(
            Bar.at_most(f"routing decision, {ENGINES} engines, {name}: p99", p99_us, MOST_P99_US, "µs")
        )
    return results, bars


def _choose(
    router: Router[_Engine], engines: list[_Engine], draw: random.Random, *, short: bool
) -> tuple[float, ...]:
    """Seconds of each choice."""
    for engine in engines:
        engine.running, engine.others = draw.randrange(16), draw.randrange(16)
    common = draw.getrandbits(64)
    samples_s = []
    for number in range(CHOICES):
        key = None if short else common if number % 4 == 0 else draw.getrandbits(64)
        job = Job(
            prompt_tokens=1,
            prompt_end=(),
            prompt_end_text="",
            shows_special_tokens=False,
            includes_stop=False,
            n=1,
            stop=(),
            stop_token_ids=(),
            message=b"",
            prefix_key=key,
            seed=0,
        )
        begun_s = time.perf_counter()
        chosen = router.choose(job)
        samples_s.append(time.perf_counter() - begun_s)
        chosen.running += 1
        ending = draw.choice(engines)
        ending.running -= ending.running > 0
    return tuple(samples_s)
