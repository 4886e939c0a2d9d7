"""Loading a checkpoint of safetensors: its memory, and its speed against a plain read of the same files.

Called through ``catalogue``. Each load is a process of its own; the page cache holds the files. Every round
reads the files plainly, loads them with all hashes, and loads them with cached hashes, so that a drift of the
machine affects all.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from farshore.benchmarks.load.checkpoint import Shape, write
from farshore.benchmarks.machine import Facts
from farshore.benchmarks.report import Bar, Report, Result
from farshore.benchmarks.timing import Timing
from farshore.errors import InvalidRequest, StartupError

MOST_MEMORY = 1.3
"""Peak memory over the process's before, in sizes of the loaded weights."""
CASES = ("bfloat16", "bfloat16, known content", "float32")
_OLD_S = 60
"""Age that the files are given: hashes of files that changed just now are not cached."""
_PIECE_BYTES = 4 << 20
_CHILD_DEADLINE_S = 600.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """Tests use tiny ones."""

    shape: Shape = field(default_factory=Shape)
    rounds: int = 3


def run(facts: Facts, sizes: Sizes, *, only: str = "", progress: Callable[[str], None]) -> Report:
    """Measures the cases whose name contains ``only``. InvalidRequest if there are none."""
    cases = [case for case in CASES if only in case]
    if not cases:
        raise InvalidRequest(f"no case holds {only!r}: choose from {'; '.join(CASES)}")
    with tempfile.TemporaryDirectory(prefix="farshore-load-") as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        progress("writing a checkpoint")
        files = write(folder, sizes.shape)
        for path in files:
            os.utime(path, (time.time() - _OLD_S,) * 2)
        caches = {case: Path(temporary) / f"cache {number}" for number, case in enumerate(CASES)}
        plain_s: list[float] = []
        loads: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
        for number in range(sizes.rounds):
            progress(f"round {number + 1} of {sizes.rounds}")
            plain_s.append(_read(files))
            for case in cases:
                dtype, _, known = case.partition(", ")
                if not known:
                    _forget(caches[case])
                elif not caches[case].exists():
                    _load(folder, dtype, facts.threads, caches[case])
                loads[case].append(_load(folder, dtype, facts.threads, caches[case]))
        file_bytes = sum(path.stat().st_size for path in files)
    plain = Timing(tuple(plain_s))
    results = [Result("plain read", plain, {"mb_per_s": file_bytes / plain.median_s / 1e6})]
    bars = []
    for case, runs in loads.items():
        result, bar = _compare(case, runs, plain, file_bytes)
        results.append(result)
        bars.append(bar)
    machine = asdict(facts) | {"checkpoint_bytes": file_bytes, "files": len(files)}
    return Report(machine, tuple(results), tuple(bars))


def _compare(case: str, runs: list[dict[str, Any]], plain: Timing, file_bytes: int) -> tuple[Result, Bar]:
    timing = Timing(tuple(run["load_s"] for run in runs))
    weights_bytes = file_bytes * (2 if case.startswith("float32") else 1)
    memory = max((run["peak_bytes"] - run["before_bytes"]) / weights_bytes for run in runs)
    figures = {
        "mb_per_s": file_bytes / timing.median_s / 1e6,
        "times_a_plain_read": timing.over(plain),
        "cpu_s": median(run["cpu_s"] for run in runs),
        "peak_over_weights": memory,
        "before_bytes": runs[-1]["before_bytes"],
        "peak_bytes": runs[-1]["peak_bytes"],
        "contents": len({run["content"] for run in runs}),
    }
    bar = Bar.at_most(f"{case}, peak memory", memory, MOST_MEMORY, "sizes of the weights")
    return Result(case, timing, figures), bar


def _read(files: list[Path]) -> float:
    """Seconds that it takes to read the files into one small buffer."""
    buffer = bytearray(_PIECE_BYTES)
    begun_s = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - begun_s


def _load(folder: Path, dtype: str, threads: int, cache: Path) -> dict[str, Any]:
    child = subprocess.run(
        [sys.executable, "-P", "-m", "farshore.benchmarks.load.child", str(folder), dtype, str(threads)],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        timeout=_CHILD_DEADLINE_S,
    )
    if child.returncode:
        raise StartupError(f"loading failed: {' '.join(child.stderr.strip().splitlines()[-1:])}")
    figures: dict[str, Any] = json.loads(child.stdout)
    return figures


def _forget(cache: Path) -> None:
    for path in cache.rglob("*.json"):
        path.unlink()
