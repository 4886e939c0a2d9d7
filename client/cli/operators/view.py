"""The snapshots of ``farshore top``: what a cluster does now, from its status and the one before; as text.

Used by ``top``. Rates are differences of counters, so the first snapshot has none. Must not know terminals.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from farshore.client.cli.terminal import size, table
from farshore.client.events import ClusterStatus, Link, Worker


class Sample(NamedTuple):
    """A status, and when it came, on a clock that never steps."""

    status: ClusterStatus
    at_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkerNow:
    """A worker. ``tokens_per_s`` is a dense worker's; ``attended_bytes_per_s``: KV that attention read here.
    Both are None where no earlier status has the worker."""

    worker_id: str
    kind: str
    state: str
    budget_bytes: int
    free_bytes: int
    running: int
    waiting: int
    parked: int
    tokens_per_s: float | None
    attended_bytes_per_s: float | None
    links: tuple[Link, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The fields are the keys of ``farshore top --json``. ``sequences``: those that hold KV."""

    unix_s: float
    model: str
    version: str
    pool_budget_bytes: int
    pool_free_bytes: int
    sequences: int
    running: int
    waiting: int
    parked: int
    tokens_per_s: float | None
    workers: tuple[WorkerNow, ...]


def snapshot(sample: Sample, before: Sample | None, *, unix_s: float) -> Snapshot:
    """The snapshot of a status that came at ``unix_s``. ``before``: the last one."""
    status = sample.status
    earlier = {} if before is None else {worker.worker_id: worker for worker in before.status.workers}
    passed_s = 0.0 if before is None else sample.at_s - before.at_s
    workers = tuple(_now(worker, earlier.get(worker.worker_id), passed_s) for worker in status.workers)
    rates = [worker.tokens_per_s for worker in workers if worker.tokens_per_s is not None]
    return Snapshot(
        unix_s=unix_s,
        model=status.model,
        version=status.version,
        pool_budget_bytes=status.pool_budget_bytes,
        pool_free_bytes=status.pool_free_bytes,
        sequences=len(status.sequences),
        running=sum(worker.running for worker in workers),
        waiting=sum(worker.waiting for worker in workers),
        parked=sum(worker.parked for worker in workers),
        tokens_per_s=sum(rates) if rates else None,
        workers=workers,
    )


def _now(worker: Worker, before: Worker | None, passed_s: float) -> WorkerNow:
    def rate(counter: Callable[[Worker], int]) -> float | None:
        # A worker that does not answer reports no counters.
        if before is None or passed_s <= 0 or counter(worker) < counter(before):
            return None
        return (counter(worker) - counter(before)) / passed_s

    names = [field.name for field in dataclasses.fields(WorkerNow) if not field.name.endswith("_per_s")]
    return WorkerNow(
        **{name: getattr(worker, name) for name in names},
        tokens_per_s=rate(lambda each: each.tokens) if worker.kind == "dense" else None,
        attended_bytes_per_s=rate(lambda each: each.attended_bytes),
    )


class Line(NamedTuple):
    """A line of text, and its style: "", or one of ``terminal.styled``."""

    text: str
    style: str = ""


def render(now: Snapshot) -> list[Line]:
    """The snapshot as lines."""
    used_bytes = now.pool_budget_bytes - now.pool_free_bytes
    part = used_bytes / now.pool_budget_bytes if now.pool_budget_bytes else 0.0
    lines = [
        Line(f"{now.model}, Farshore {now.version}", "bold"),
        Line(f"pool       [{'#' * round(20 * part):20}] {size(used_bytes)} of {size(now.pool_budget_bytes)}"),
        Line(
            f"sequences  {now.running} running, {now.waiting} waiting, {now.parked} parked; "
            f"{now.sequences} with stored KV"
        ),
        Line(f"tokens     {_rate(now.tokens_per_s)} generated"),
        Line(""),
    ]
    header = (
        "WORKER",
        "KIND",
        "STATE",
        "USED",
        "BUDGET",
        "RUNNING",
        "WAITING",
        "PARKED",
        "TOKENS",
        "KV READ",
    )
    first, *others = table(header, [_cells(worker) for worker in now.workers])
    lines += [Line(first, "dim")]
    lines += [
        Line(text, "" if worker.state in ("ready", "draining") else "red")
        for text, worker in zip(others, now.workers, strict=True)
    ]
    return lines + _links(now)


def _cells(worker: WorkerNow) -> tuple[object, ...]:
    dense = worker.kind == "dense"
    read = worker.attended_bytes_per_s
    return (
        worker.worker_id,
        worker.kind,
        worker.state,
        size(worker.budget_bytes - worker.free_bytes),
        size(worker.budget_bytes),
        *((worker.running, worker.waiting, worker.parked) if dense else ("-", "-", "-")),
        _rate(worker.tokens_per_s) if dense else "-",
        "-" if read is None else f"{size(round(read))}/s",
    )


def _links(now: Snapshot) -> list[Line]:
    """The latency of each attention worker, as each dense worker that reads from it sees it."""
    links = [(worker.worker_id, link) for worker in now.workers for link in worker.links]
    if not links:
        return []
    rows = [
        (
            f"{dense} > {link.worker_id}",
            link.transport or "not connected",
            f"{link.p50_ms:.3g} ms",
            f"{link.p99_ms:.3g} ms",
            link.failures,
            "slow" if link.slow else "",
        )
        for dense, link in links
    ]
    first, *others = table(("SHARD LATENCY", "TRANSPORT", "P50", "P99", "FAILURES", ""), rows)
    marked = [Line(text, "red" if link.slow else "") for text, (_, link) in zip(others, links, strict=True)]
    return [Line(""), Line(first, "dim"), *marked]


def _rate(per_s: float | None) -> str:
    return "-" if per_s is None else f"{per_s:.1f}/s"
