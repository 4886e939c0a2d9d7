"""A cluster's status as the JSON object that the page draws: bounded, and no more than the page shows.

Used by ``watch``. Every field is named here, so that one that is added to the protocol is not published by
accident. Must not know HTTP or how the status came.
"""

import heapq
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

from farshore.proto import admin_pb2 as admin
from farshore.proto.words import word
from farshore.text import shortened

MOST_WORKERS = 256
MOST_SEQUENCES = 64
MOST_SPANS = 64
"""The spans shown for one sequence."""
MOST_EVENTS = 50
MOST_CHARS = 200
"""The longest name, and the longest detail of an event."""


class Sample(NamedTuple):
    """The counters of a status that came at ``at_s``, on a clock that never steps."""

    tokens: Mapping[str, int]
    """Generated tokens, by dense worker."""
    attended_bytes: Mapping[str, int]
    """KV bytes that attention read, by worker."""
    at_s: float

    @classmethod
    def of(cls, status: admin.ClusterStatusResponse, at_s: float) -> Self:
        # A worker that does not answer reports no counters.
        answering = [worker for worker in status.workers if worker.state != admin.WORKER_STATE_UNREACHABLE]
        dense = (worker for worker in answering if worker.kind == admin.WORKER_KIND_DENSE)
        return cls(
            {worker.worker_id: worker.tokens for worker in dense},
            {worker.worker_id: worker.attended_bytes for worker in answering},
            at_s,
        )


def view(
    status: admin.ClusterStatusResponse,
    events: Iterable[admin.ClusterEvent],
    *,
    now: Sample,
    before: Sample,
    unix_s: float,
) -> dict[str, Any]:
    """The page's JSON object. ``now``: the counters of ``status``; ``before``: earlier ones, or the same, and
    then the rates are null. ``events``: oldest first. The first workers, spans and events are shown, and
    the longest sequences; ``…_left_out`` counts the others."""
    workers = status.workers[:MOST_WORKERS]
    longest = _longest(status.sequences)
    local = status.placement == "local"
    pool_kind = admin.WORKER_KIND_DENSE if local else admin.WORKER_KIND_ATTENTION
    ready = (worker for worker in status.workers if worker.state == admin.WORKER_STATE_READY)
    pool = [worker for worker in ready if worker.kind == pool_kind]
    rates = [rate for name in now.tokens if (rate := _rate(name, "tokens", now, before)) is not None]
    latencies = _latencies(status.workers)
    return {
        "unix_s": unix_s,
        "version": shortened(status.version, MOST_CHARS),
        "model": shortened(status.model, MOST_CHARS),
        "dtype": shortened(status.dtype, MOST_CHARS),
        "kv_format": shortened(status.kv_format, MOST_CHARS),
        "tokens_per_s": sum(rates) if rates else None,
        "running": sum(worker.running for worker in status.workers),
        "waiting": sum(worker.waiting for worker in status.workers),
        "parked": sum(worker.parked for worker in status.workers),
        "pool": {
            "budget_bytes": status.pool_budget_bytes,
            "free_bytes": status.pool_free_bytes,
            "cached_bytes": sum(worker.cached_bytes for worker in pool),
        },
        "workers": [
            _worker(worker, now, before) | latencies.get(worker.worker_id, _NO_LATENCY) for worker in workers
        ],
        "workers_left_out": len(status.workers) - len(workers),
        "sequences": [_sequence(sequence) for sequence in longest],
        "sequences_left_out": len(status.sequences) - len(longest),
        "events": [_event(event) for event in events],
    }


def _worker(worker: admin.WorkerStatus, now: Sample, before: Sample) -> dict[str, Any]:
    name = worker.worker_id
    return {
        "worker_id": shortened(name, MOST_CHARS),
        "kind": word(admin.WorkerKind, worker.kind),
        "host": shortened(worker.host, MOST_CHARS),
        "state": word(admin.WorkerState, worker.state),
        "failure": shortened(worker.failure, MOST_CHARS),
        "budget_bytes": worker.budget_bytes,
        "free_bytes": worker.free_bytes,
        "cached_bytes": worker.cached_bytes,
        "running": worker.running,
        "waiting": worker.waiting,
        "parked": worker.parked,
        "tokens_per_s": _rate(name, "tokens", now, before),
        "attended_bytes_per_s": _rate(name, "attended_bytes", now, before),
    }


_NO_LATENCY = {"p99_ms": None, "slow": False, "failures": 0}


def _latencies(workers: Iterable[admin.WorkerStatus]) -> dict[str, dict[str, Any]]:
    """For each worker that engines read from: how it answers the engine that waits longest for it."""
    found: dict[str, dict[str, Any]] = {}
    for link in (link for worker in workers for link in worker.links):
        known = found.get(link.worker_id, _NO_LATENCY)
        p99_ms = max(known["p99_ms"] or 0.0, link.p99_ms)
        found[link.worker_id] = {
            "p99_ms": p99_ms if math.isfinite(p99_ms) else None,
            "slow": known["slow"] or link.slow,
            "failures": known["failures"] + link.failures,
        }
    return found


def _longest(sequences: Iterable[admin.SequenceStatus]) -> list[admin.SequenceStatus]:
    """The longest ones, in their own order, so that rows of the page keep their places."""
    longest = heapq.nlargest(MOST_SEQUENCES, enumerate(sequences), key=lambda item: item[1].tokens)
    return [sequence for _, sequence in sorted(longest, key=lambda item: item[0])]


def _sequence(sequence: admin.SequenceStatus) -> dict[str, Any]:
    return {
        "sequence_id": shortened(sequence.sequence_id, MOST_CHARS),
        "owner": shortened(sequence.owner, MOST_CHARS),
        "tokens": sequence.tokens,
        "tail_first": sequence.tail_first,
        "spans": [
            {
                "worker_id": shortened(span.worker_id, MOST_CHARS),
                "first": span.first,
                "last": span.last,
                "group0": span.group0,
                "group1": span.group1,
                "bytes": span.bytes,
            }
            for span in sequence.spans[:MOST_SPANS]
        ],
        "spans_left_out": max(0, len(sequence.spans) - MOST_SPANS),
    }


def _event(event: admin.ClusterEvent) -> dict[str, Any]:
    return {
        "number": event.number,
        "unix_s": event.unix_s if math.isfinite(event.unix_s) else 0.0,
        "kind": shortened(event.kind, MOST_CHARS),
        "subject": shortened(event.subject, MOST_CHARS),
        "detail": shortened(event.detail, MOST_CHARS),
    }


def _rate(name: str, counter: str, now: Sample, before: Sample) -> float | None:
    """The counter's growth per second, or None where the two samples do not tell."""
    passed_s = now.at_s - before.at_s
    counted, counted_before = getattr(now, counter).get(name), getattr(before, counter).get(name)
    if counted is None or counted_before is None or passed_s <= 0 or counted < counted_before:
        return None
    return (counted - counted_before) / passed_s
