"""The faults benchmark: measures how bad requests and a frozen worker affect other requests of a real server.

Called through ``catalogue``. Each part starts its own servers (``farshore serve``) and ends them. A part that
breaks off reports what it has found so far, and the reason; its other bars are missed. The bars hold for a
quiet machine.
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
from farshore.benchmarks.faults import freeze as faults_freeze
from farshore.benchmarks.faults import hostile as faults_hostile
from farshore.benchmarks.faults import oversize as faults_oversize
from farshore.benchmarks.faults.setting import Setting, Sizes
from farshore.benchmarks.machine import Facts
from farshore.benchmarks.report import Report

Part = Callable[[Setting], Awaitable[Measured]]

PART_DEADLINE_S = {"hostile": 5400.0, "freeze": 1200.0, "tokenize": 900.0, "refuse": 900.0}
"""How long each part may take before it is considered hung."""


def run(
    facts: Facts,
    sizes: Sizes,
    *,
    seed: int | None = None,
    only: str = "",
    progress: Callable[[str], None],
) -> Report:
    """Runs the parts whose names contain ``only``, with a random seed if none is given.

    Raises InvalidRequest, before it starts a server, if there is no such part."""
    chosen = cases.choose(PARTS, only, kind="part")
    setting = Setting(sizes, secrets.randbits(32) if seed is None else seed, progress)
    measured = asyncio.run(_all(chosen, setting))
    results = tuple(chain.from_iterable(each for each, _ in measured))
    bars = tuple(chain.from_iterable(each for _, each in measured))
    return Report({**asdict(facts), "seed": setting.seed}, results, bars)


async def _all(chosen: dict[str, Part], setting: Setting) -> list[Measured]:
    """Runs the parts on one event loop: gRPC's asyncio supports one per process. SIGTERM ends the servers
    too."""
    task = asyncio.current_task()
    if task is not None and threading.current_thread() is threading.main_thread():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return [await part(setting) for part in chosen.values()]


async def _hostile(setting: Setting) -> Measured:
    found, begun_s = faults_hostile.HostileFindings(setting.seed), time.perf_counter()
    why = await _broken(faults_hostile.measure(setting, found), "hostile")
    return faults_bars.hostile(found, setting.sizes, why, time.perf_counter() - begun_s)


async def _freeze(setting: Setting) -> Measured:
    found, begun_s = faults_freeze.FreezeFindings(), time.perf_counter()
    why = await _broken(faults_freeze.measure(setting, found), "freeze")
    return faults_bars.freeze(found, setting.sizes, why, time.perf_counter() - begun_s)


async def _tokenize(setting: Setting) -> Measured:
    found, begun_s = faults_oversize.TokenizeFindings(), time.perf_counter()
    why = await _broken(faults_oversize.tokenize(setting, found), "tokenize")
    return faults_bars.tokenize(found, setting.sizes, why, time.perf_counter() - begun_s)


async def _refuse(setting: Setting) -> Measured:
    found: dict[str, faults_oversize.RefuseFindings] = {}
    begun_s = time.perf_counter()
    why = await _broken(faults_oversize.refuse(setting, found), "refuse")
    return faults_bars.refuse(found, why, time.perf_counter() - begun_s)


async def _broken(part: Awaitable[None], name: str) -> str:
    """Runs a part; returns the reason why it broke off, or "". No error reaches the other parts."""
    try:
        async with asyncio.timeout(PART_DEADLINE_S[name]):
            await part
    except TimeoutError:
        return f"not done within {PART_DEADLINE_S[name]:.0f} s"
    except Exception as error:
        return "; ".join(f"{type(each).__name__}: {each}"[:300] for each in _leaves(error))
    return ""


def _leaves(error: Exception) -> Iterator[Exception]:
    """Yields the errors inside of exception groups, at any depth."""
    if isinstance(error, ExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error


PARTS: dict[str, Part] = {"hostile": _hostile, "freeze": _freeze, "tokenize": _tokenize, "refuse": _refuse}
