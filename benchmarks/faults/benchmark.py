"""The faults benchmark: bad requests and a frozen worker against a real ``farshore serve``; what others see.

Called through ``catalogue``. Each part starts servers of its own and ends them; one that breaks off reports
what it had found, its bars as missed, and why. Bars are those of issue 15, for a quiet machine.
"""

import asyncio
import secrets
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from itertools import chain

from farshore.benchmarks import cases
from farshore.benchmarks.cases import Measured
from farshore.benchmarks.faults import bars as faults_bars
from farshore.benchmarks.faults import door as faults_door
from farshore.benchmarks.faults import freeze as faults_freeze
from farshore.benchmarks.faults import hostile as faults_hostile
from farshore.benchmarks.faults.setting import Setting, Sizes
from farshore.benchmarks.machine import Facts
from farshore.benchmarks.report import Report

Part = Callable[[Setting], Awaitable[Measured]]

PART_DEADLINE_S = {"hostile": 5400.0, "freeze": 1200.0, "tokenize": 900.0, "refuse": 900.0}
"""A part that takes longer has hung."""


def run(
    facts: Facts,
    sizes: Sizes,
    *,
    seed: int | None = None,
    only: str = "",
    progress: Callable[[str], None],
) -> Report:
    """The parts whose name holds ``only``. InvalidRequest, before anything is started, if there are none."""
    chosen = cases.choose(PARTS, only, kind="part")
    at = Setting(sizes, secrets.randbits(32) if seed is None else seed, progress)
    measured = asyncio.run(_all(chosen, at))
    results = tuple(chain.from_iterable(each for each, _ in measured))
    bars = tuple(chain.from_iterable(each for _, each in measured))
    return Report({**asdict(facts), "seed": at.seed}, results, bars)


async def _all(chosen: dict[str, Part], at: Setting) -> list[Measured]:
    """On one loop: gRPC's asyncio side takes one per process. SIGTERM ends the servers too."""
    task = asyncio.current_task()
    if task is not None and threading.current_thread() is threading.main_thread():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return [await part(at) for part in chosen.values()]


async def _hostile(at: Setting) -> Measured:
    found, begun_s = faults_hostile.Found(at.seed), time.perf_counter()
    why = await _broken(faults_hostile.measure(at, found), "hostile")
    return faults_bars.hostile(found, at.sizes, why, time.perf_counter() - begun_s)


async def _freeze(at: Setting) -> Measured:
    found, begun_s = faults_freeze.Found(), time.perf_counter()
    why = await _broken(faults_freeze.measure(at, found), "freeze")
    return faults_bars.freeze(found, at.sizes, why, time.perf_counter() - begun_s)


async def _tokenize(at: Setting) -> Measured:
    found, begun_s = faults_door.Tokenized(), time.perf_counter()
    why = await _broken(faults_door.tokenize(at, found), "tokenize")
    return faults_bars.tokenize(found, at.sizes, why, time.perf_counter() - begun_s)


async def _refuse(at: Setting) -> Measured:
    found: dict[str, faults_door.Refused] = {}
    begun_s = time.perf_counter()
    why = await _broken(faults_door.refuse(at, found), "refuse")
    return faults_bars.refuse(found, why, time.perf_counter() - begun_s)


async def _broken(part: Awaitable[None], name: str) -> str:
    """Why the part broke off, or "". Whatever it was: the other parts are measured all the same."""
    try:
        async with asyncio.timeout(PART_DEADLINE_S[name]):
            await part
    except TimeoutError:
        return f"not done within {PART_DEADLINE_S[name]:.0f} s"
    except Exception as error:
        return "; ".join(f"{type(each).__name__}: {each}"[:300] for each in _leaves(error))
    return ""


def _leaves(error: Exception) -> Iterator[Exception]:
    """Of groups, what is in them."""
    if isinstance(error, ExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error


PARTS: dict[str, Part] = {"hostile": _hostile, "freeze": _freeze, "tokenize": _tokenize, "refuse": _refuse}
