"""``farshore status``: prints workers, memory, and where each live sequence's KV is stored.

Called by ``main``. Must not know anything but the SDK's ``ClusterStatus``.
"""

import argparse
import dataclasses
import json

from farshore.client.cli.connect import connected
from farshore.client.cli.options.gateway import add_gateway_options
from farshore.client.cli.terminal import size, table, write
from farshore.client.events import ClusterStatus, Sequence


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "status",
        help="show workers, memory and where sequences live",
        description="Show a running cluster's workers, its memory, and where each live sequence's KV is.",
        epilog="example: farshore status --server 10.0.0.1:50051",
    )
    add_gateway_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    with connected(args) as client:
        status = client.status()
    write(f"{json.dumps(dataclasses.asdict(status)) if args.json else render(status)}\n")
    return 0


def render(status: ClusterStatus) -> str:
    """The status as text for a terminal."""
    guesses = status.speculate_tokens
    guessing = f"up to {guesses} tokens guessed ahead" if guesses else "nothing guessed ahead"
    used_bytes = status.pool_budget_bytes - status.pool_free_bytes
    # Where a worker is, if it was told.
    named = [name for name in ("NODE", "ZONE") if any(getattr(w, name.lower()) for w in status.workers)]
    lines = [
        f"{status.model} ({status.dtype}, {status.max_positions} positions), Farshore {status.version}",
        f"placement {status.placement}, sharded by {status.shard_by}, KV as {status.kv_format}",
        f"at most {status.max_decode_stall_ms:g} ms from token to token beside other prompts; {guessing}",
        f"pool: {size(used_bytes)} of {size(status.pool_budget_bytes)} used",
        "",
        *table(
            ("WORKER", "KIND", "STATE", "ADDRESS", "PID", "USED", "BUDGET", "DEVICE", *named),
            [
                (
                    worker.worker_id,
                    worker.kind,
                    worker.state,
                    worker.address,
                    worker.process_id,
                    size(worker.budget_bytes - worker.free_bytes),
                    size(worker.budget_bytes),
                    worker.device,
                    *(getattr(worker, name.lower()) for name in named),
                )
                for worker in status.workers
            ],
        ),
        *(f"{worker.worker_id} failed: {worker.failure}" for worker in status.workers if worker.failure),
        "",
        *_links(status),
    ]
    if not status.sequences:
        return "\n".join([*lines, "no live sequences"])
    rows = [row for sequence in status.sequences for row in _sequence_rows(sequence)]
    return "\n".join([*lines, *table(("SEQUENCE", "TOKENS", "WHERE", "RANGE", "HEAD GROUPS", "SIZE"), rows)])


def _links(status: ClusterStatus) -> list[str]:
    """A table of the connections from dense workers to the attention workers that they have read from."""
    rows = [
        (
            f"{worker.worker_id} → {link.worker_id}",
            link.transport or "not connected",
            link.frames,
            f"{link.p50_ms:.3g} ms",
            f"{link.p99_ms:.3g} ms",
            f"{link.deadline_ms:.3g} ms",
            link.failures,
            "slow" if link.slow else "",
        )
        for worker in status.workers
        for link in worker.links
    ]
    header = ("LINK", "TRANSPORT", "FRAMES", "P50", "P99", "DEADLINE", "FAILURES", "")
    return [*table(header, rows), ""] if rows else []


def _sequence_rows(sequence: Sequence) -> list[tuple[object, ...]]:
    """A row for each span and one for the tail; ranges are written first..last, without last."""
    locations = [
        (span.worker_id, f"{span.first}..{span.last}", f"{span.group0}..{span.group1}", size(span.bytes))
        for span in sequence.spans
    ]
    locations.append((f"{sequence.owner} (tail)", f"{sequence.tail_first}..{sequence.tokens}", "all", "-"))
    names = [(sequence.sequence_id, sequence.tokens)] + [("", "")] * (len(locations) - 1)
    return [(*name, *location) for name, location in zip(names, locations, strict=True)]
