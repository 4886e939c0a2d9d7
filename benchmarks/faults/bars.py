"""What the parts of ``faults`` found, against the bars of issue 15. Pure.

Called by ``faults``. What could not be measured is None, and missed; the note says why.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from farshore.benchmarks.cases import Measured
from farshore.benchmarks.faults.door import Refused, Tokenized
from farshore.benchmarks.faults.freeze import GRACE_S
from farshore.benchmarks.faults.freeze import Found as Frozen
from farshore.benchmarks.faults.hostile import Found as Endured
from farshore.benchmarks.faults.requests import Kind
from farshore.benchmarks.faults.sender import CASES
from farshore.benchmarks.faults.setting import ISSUE_REQUESTS, Sizes
from farshore.benchmarks.faults.stream import percentile
from farshore.benchmarks.report import Bar, Result
from farshore.benchmarks.timing import Timing

LEAST_OF_A_KIND, LEAST_GENERATED, LEAST_PARKINGS = 100, 600, 50
"""Of ``ISSUE_REQUESTS``."""
MOST_RSS_PERCENT = 5.0
MOST_DEADLINE_MS = 400.0
MOST_OVER_DEADLINE_MS = 150.0
MOST_FIRST_TOKEN_S = 2.0
MOST_OVER_GRACE_S = 1.0
MOST_WHOLE_S = 10.0
MOST_PROBE_MS = 100.0
MOST_GAP_MS = 250.0
MOST_LOOP_MS = 50.0


def hostile(found: Endured, sizes: Sizes, why: str, took_s: float) -> Measured:
    share = min(1.0, sizes.requests / ISSUE_REQUESTS)
    why = why or (f"ended early: {found.stopped}" if found.stopped else "")
    ran = found.bystander_runs > 0
    ours = {name: growth for name, growth in found.rss_growth.items() if _ours(name)}
    rays = {name: growth for name, growth in found.rss_growth.items() if not _ours(name)}
    least = min((found.sent[str(kind)] for kind in Kind), default=0)
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


def freeze(found: Frozen, sizes: Sizes, why: str, took_s: float) -> Measured:
    half = sizes.sequences // 2
    unequal = None if found.readers is None else abs(found.readers - half)
    untold = why or ("" if found.deadline_ms is not None else "status tells no deadline of the link")
    most_gap_ms = (found.deadline_ms or MOST_DEADLINE_MS) + MOST_OVER_DEADLINE_MS
    gap_ms, different = _ms(found.gap_s), found.different
    failed = found.failed if found.streams else None
    end_s = found.hit_ended_s if found.hit_for_good else None
    unclear = found.unclear if found.hit_for_good else None
    bars = [
        Bar.at_most(
            f"freeze: sequences with spans there, beside {half}",
            unequal,
            0,
            "sequences",
            why or (f"{found.readers} of {sizes.sequences}" if unequal else ""),
        ),
        Bar.at_least("freeze: frames before", found.frames, sizes.frames, "frames", why),
        Bar.at_most("freeze: deadline in force", found.deadline_ms, MOST_DEADLINE_MS, "ms", untold),
        Bar.at_most("freeze: streams failed", _count(failed), 0, "streams", _first(why, failed or [])),
        Bar.at_most("freeze: streams differ", _count(different), 0, "streams", _first(why, different or [])),
        Bar.at_most("freeze: longest gap of the others", gap_ms, most_gap_ms, "ms", untold),
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
        Bar.at_most("frozen for good: pool whole after a thaw", found.whole_s, MOST_WHOLE_S, "s", why),
    ]
    figures: dict[str, Any] = {
        "broken_off": why or None,
        "readers": found.readers,
        "frames": found.frames,
        "deadline_ms": found.deadline_ms,
        "hit_longest_gap_ms": _ms(found.hit_gap_s),
        "for_good_hit": found.hit_for_good,
        "for_good_hit_ended_as": dict(found.hit_errors),
        "for_good_others_ended_as": dict(found.bystanders_for_good),
        "missing_bytes": found.missing_bytes,
        "failures": found.failed[:8],
        "unclear": (found.unclear or [])[:4],
    }
    gaps = [b - a for stream in found.streams for a, b in pairwise(stream.times_s)]
    return [_result("freeze", gaps, took_s, figures)], bars


def tokenize(found: Tokenized, sizes: Sizes, why: str, took_s: float) -> Measured:
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


def refuse(found: Mapping[str, Refused], why: str, took_s: float) -> Measured:
    """The loop's time: that of its thread on a core, or how long it kept a probe waiting, whichever is
    more. The first misses what another thread does with the interpreter's lock held; the second what is
    done in small pieces."""
    results, bars = [], []
    for case in CASES:
        one = found.get(case, Refused())
        accepted = [answer for answer in one.answers if answer.startswith("OK")]
        loop_ms = _ms(max((*one.loop_s, *one.delay_s), default=None))
        bars += [
            Bar.at_most(f"refuse: {case}", loop_ms, MOST_LOOP_MS, "ms of the loop", why),
            Bar.at_most(
                f"refuse: {case}, not refused",
                len(accepted) if one.answers else None,
                0,
                "times",
                why or (one.answers[-1] if one.answers else ""),
            ),
        ]
        figures: dict[str, Any] = {
            "broken_off": why or None,
            "loop_cpu_ms": _ms(max(one.loop_s, default=None)),
            "longest_probe_ms": _ms(max(one.delay_s, default=None)),
            "answers": one.answers,
        }
        results.append(_result(f"refuse: {case}", one.took_s, took_s, figures))
    return results, bars


def _result(name: str, times_s: list[float], took_s: float, figures: dict[str, Any]) -> Result:
    """Of nothing measured the timing is the part's own."""
    return Result(name, Timing(tuple(times_s) or (took_s,)), {**figures, "took_s": took_s})


def _ours(name: str) -> bool:
    """Workers by their ids, the gateway, the command, and our actors; the rest is Ray's."""
    return name.startswith(("attention", "dense", "gateway", "serve", "ray::Controller"))


def _count(things: list[str] | None, known: bool = True) -> int | None:
    return len(things) if things is not None and known else None


def _first(why: str, things: list[str]) -> str:
    return things[0] if things else why


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
