"""Compares the findings of the faults benchmark with its bars. Pure.

Called by ``faults.benchmark``. A value that could not be measured is None; its bar is missed, and the bar's
note says why.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from farshore.benchmarks.cases import Measured
from farshore.benchmarks.faults.freeze import GRACE_S, FreezeFindings
from farshore.benchmarks.faults.hostile import HostileFindings
from farshore.benchmarks.faults.oversize import RefuseFindings, TokenizeFindings
from farshore.benchmarks.faults.requests import HostileKind
from farshore.benchmarks.faults.sender import CASES
from farshore.benchmarks.faults.setting import ISSUE_REQUESTS, Sizes
from farshore.benchmarks.faults.stream import percentile
from farshore.benchmarks.report import Bar, Result
from farshore.benchmarks.timing import Timing

LEAST_OF_A_KIND, LEAST_GENERATED, LEAST_PARKINGS = 100, 600, 50
"""For a run of ``ISSUE_REQUESTS``; a shorter run needs its share of them."""
MOST_RSS_PERCENT = 5.0
MOST_DEADLINE_MS = 400.0
MOST_OVER_DEADLINE_MS = 150.0
MOST_FIRST_TOKEN_S = 2.0
MOST_OVER_GRACE_S = 1.0
MOST_RECOVERY_S = 10.0
MOST_PROBE_MS = 100.0
MOST_GAP_MS = 250.0
MOST_LOOP_MS = 50.0


def hostile(found: HostileFindings, sizes: Sizes, why: str, took_s: float) -> Measured:
    """The result and the bars of part ``hostile``. ``why`` is the reason why the part broke off, or ""."""
    share = min(1.0, sizes.requests / ISSUE_REQUESTS)
    why = why or (f"ended early: {found.stopped}" if found.stopped else "")
    ran = found.bystander_runs > 0
    ours = {name: growth for name, growth in found.rss_growth.items() if _ours(name)}
    rays = {name: growth for name, growth in found.rss_growth.items() if not _ours(name)}
    least = min((found.sent[str(kind)] for kind in HostileKind), default=0)
    failed, different = found.bystander_failures, found.bystander_differences
    bars = [
        Bar.at_most("hostile: bystanders failed", _count(failed, ran), 0, "runs", _first(why, failed)),
        Bar.at_most("hostile: bystanders differ", _count(different, ran), 0, "runs", _first(why, different)),
        Bar.at_most("hostile: exits", _count(found.exits), 0, "processes", _first(why, found.exits or [])),
        Bar.at_most("hostile: memory not back", found.held_bytes, 0, "bytes", why),
        Bar.at_most("hostile: sequences left", found.sequences_left, 0, "sequences", why),
        *(
            Bar.at_most(f"hostile: RSS of {name}", growth, MOST_RSS_PERCENT, "% more", why)
            for name, growth in sorted(ours.items())
        ),
        Bar.at_most(
            "hostile: RSS of Ray's own",
            max(rays.values(), default=None),
            MOST_RSS_PERCENT,
            "% more",
            why or max(rays, key=rays.__getitem__, default=""),
        ),
        Bar.at_least("hostile: of each kind", least, int(LEAST_OF_A_KIND * share), "requests", why),
        Bar.at_least(
            "hostile: that generated", found.generated, int(LEAST_GENERATED * share), "requests", why
        ),
        Bar.at_least(
            "hostile: parkings",
            found.parkings,
            int(LEAST_PARKINGS * share),
            "parkings",
            why or ("" if found.parkings is not None else "status tells no parkings"),
        ),
    ]
    if not ours:
        bars.append(Bar.at_most("hostile: RSS", None, MOST_RSS_PERCENT, "% more", why or "not measured"))
    figures: dict[str, Any] = {
        "seed": found.seed,
        "ended": len(found.times_s),
        "generated": found.generated,
        "bystander_runs": found.bystander_runs,
        "quiet_s": found.quiet_s,
        "broken_off": why or None,
        "outcomes": {kind: dict(counts) for kind, counts in sorted(found.outcomes.items())},
        "rss_growth_percent": dict(sorted(found.rss_growth.items())),
        "failures": failed[:5],
        "differences": different[:5],
    }
    return [_result("hostile", found.times_s, took_s, figures)], bars


def freeze(found: FreezeFindings, sizes: Sizes, why: str, took_s: float) -> Measured:
    """The result and the bars of part ``freeze``. ``why`` as in :func:`hostile`."""
    half = sizes.sequences // 2
    unequal = None if found.readers is None else abs(found.readers - half)
    unreported = why or ("" if found.deadline_ms is not None else "status tells no deadline of the link")
    most_gap_ms = (found.deadline_ms or MOST_DEADLINE_MS) + MOST_OVER_DEADLINE_MS
    gap_ms, different = _ms(found.gap_s), found.different
    failed = found.failed if found.streams else None
    end_s = found.affected_ended_s if found.affected_for_good else None
    unclear = found.unclear if found.affected_for_good else None
    bars = [
        Bar.at_most(
            f"freeze: sequences with spans there, beside {half}",
            unequal,
            0,
            "sequences",
            why or (f"{found.readers} of {sizes.sequences}" if unequal else ""),
        ),
        Bar.at_least("freeze: frames before", found.frames, sizes.frames, "frames", why),
        Bar.at_most("freeze: deadline in force", found.deadline_ms, MOST_DEADLINE_MS, "ms", unreported),
        Bar.at_most("freeze: streams failed", _count(failed), 0, "streams", _first(why, failed or [])),
        Bar.at_most("freeze: streams differ", _count(different), 0, "streams", _first(why, different or [])),
        Bar.at_most("freeze: longest gap of the others", gap_ms, most_gap_ms, "ms", unreported),
        Bar.at_most("freeze: a new request's first token", found.new_first_s, MOST_FIRST_TOKEN_S, "s", why),
        Bar.at_most(
            "frozen for good: the hit ones end within",
            end_s,
            GRACE_S + MOST_OVER_GRACE_S,
            "s",
            why or ("" if end_s is not None else "not all of them ended"),
        ),
        Bar.at_most(
            "frozen for good: without a clear retryable error",
            _count(unclear),
            0,
            "streams",
            _first(why, unclear or []),
        ),
        Bar.at_most("frozen for good: pool whole after a thaw", found.recovered_s, MOST_RECOVERY_S, "s", why),
    ]
    figures: dict[str, Any] = {
        "broken_off": why or None,
        "readers": found.readers,
        "frames": found.frames,
        "deadline_ms": found.deadline_ms,
        "hit_longest_gap_ms": _ms(found.affected_gap_s),
        "for_good_hit": found.affected_for_good,
        "for_good_hit_ended_as": dict(found.affected_errors),
        "for_good_others_ended_as": dict(found.bystanders_for_good),
        "missing_bytes": found.missing_bytes,
        "failures": found.failed[:8],
        "unclear": (found.unclear or [])[:4],
    }
    gaps = [b - a for stream in found.streams for a, b in pairwise(stream.times_s)]
    return [_result("freeze", gaps, took_s, figures)], bars


def tokenize(found: TokenizeFindings, sizes: Sizes, why: str, took_s: float) -> Measured:
    """The result and the bars of part ``tokenize``. ``why`` as in :func:`hostile`."""
    p99_ms = _ms(percentile(found.probes_s, 99))
    bars = [
        Bar.at_least(
            "tokenize: prompts tokenized",
            found.accepted,
            sizes.prompts,
            "prompts",
            _first(why, found.refused),
        ),
        Bar.at_most("tokenize: p99 of probes", p99_ms, MOST_PROBE_MS, "ms", why),
        Bar.at_most("tokenize: longest gap of a stream", _ms(found.gap_s), MOST_GAP_MS, "ms", why),
    ]
    figures: dict[str, Any] = {
        "broken_off": why or None,
        "probes": len(found.probes_s),
        "longest_probe_ms": _ms(max(found.probes_s, default=None)),
        "idle_p99_ms": _ms(percentile(found.idle_probes_s, 99)),
        "tokenized_s": found.took_s,
    }
    return [_result("tokenize", found.probes_s, took_s, figures)], bars


def refuse(found: Mapping[str, RefuseFindings], why: str, took_s: float) -> Measured:
    """The results and the bars of part ``refuse``. ``why`` as in :func:`hostile`.

    The event loop's time is the CPU time of its thread, or the longest wait of a probe, whichever is longer.
    The CPU time misses work of other threads that hold the interpreter's lock; the wait misses work that is
    done in small pieces."""
    results, bars = [], []
    for case in CASES:
        sent = found.get(case, RefuseFindings())
        accepted = [answer for answer in sent.answers if answer.startswith("OK")]
        loop_ms = _ms(max((*sent.loop_s, *sent.delay_s), default=None))
        bars += [
            Bar.at_most(f"refuse: {case}", loop_ms, MOST_LOOP_MS, "ms of the loop", why),
            Bar.at_most(
                f"refuse: {case}, not refused",
                len(accepted) if sent.answers else None,
                0,
                "times",
                why or (sent.answers[-1] if sent.answers else ""),
            ),
        ]
        figures: dict[str, Any] = {
            "broken_off": why or None,
            "loop_cpu_ms": _ms(max(sent.loop_s, default=None)),
            "longest_probe_ms": _ms(max(sent.delay_s, default=None)),
            "answers": sent.answers,
        }
        results.append(_result(f"refuse: {case}", sent.took_s, took_s, figures))
    return results, bars


def _result(name: str, times_s: list[float], took_s: float, figures: dict[str, Any]) -> Result:
    """The timing is ``times_s``, or the part's own duration if nothing was measured."""
    return Result(name, Timing(tuple(times_s) or (took_s,)), {**figures, "took_s": took_s})


def _ours(name: str) -> bool:
    """Whether a process is Farshore's: a worker, the gateway, the command or an actor. The others are
    Ray's."""
    return name.startswith(("attention", "dense", "gateway", "serve", "ray::Controller"))


def _count(things: list[str] | None, known: bool = True) -> int | None:
    return len(things) if things is not None and known else None


def _first(why: str, things: list[str]) -> str:
    return things[0] if things else why


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
