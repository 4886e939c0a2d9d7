"""Converts directory records and listings to messages and back, for ``remote`` and ``service``."""

import logging
from collections.abc import Iterable
from dataclasses import asdict
from typing import get_args

from farshore.errors import InvalidRequest
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import (
    Announcement,
    Listing,
    Load,
    WorkerKind,
    WorkerRecord,
    WorkerState,
    block_keys,
)
from farshore.proto import cluster_pb2 as pb
from farshore.text import quoted

_LOG = logging.getLogger(__name__)
_KINDS: dict[str, WorkerKind] = {kind: kind for kind in get_args(WorkerKind)}
_STATES: dict[str, WorkerState] = {state: state for state in get_args(WorkerState)}


def record_to_pb(record: WorkerRecord) -> pb.WorkerRecord:
    fields = asdict(record)
    load = fields.pop("load")
    return pb.WorkerRecord(worker_id=fields.pop("worker"), load=pb.Load(**load) if load else None, **fields)


def record_from_pb(message: pb.WorkerRecord) -> WorkerRecord:
    """Raises InvalidRequest for a record of another version, with a kind or a state that is unknown here."""
    for field, value, known in (("kind", message.kind, _KINDS), ("state", message.state, _STATES)):
        if value not in known:
            raise InvalidRequest(
                f"{quoted(message.worker_id)[1:-1]}: {field} {quoted(value)} is unknown to this process: run "
                "the same version of Farshore everywhere"
            )
    return WorkerRecord(
        worker=WorkerId(message.worker_id),
        kind=_KINDS[message.kind],
        slot=message.slot,
        address=message.address,
        host=message.host,
        process_id=message.process_id,
        state=_STATES[message.state],
        progress=message.progress,
        shards=message.shards,
        failure=message.failure,
        content=message.content,
        load=_load_from_pb(message.load) if message.HasField("load") else None,
        zone=message.zone,
        node=message.node,
        spec=message.spec,
        device=message.device,
    )


def records_from_pb(messages: Iterable[pb.WorkerRecord]) -> list[WorkerRecord]:
    """The records that can be read: a worker of another version costs no other its place in a list."""
    records = []
    for message in messages:
        try:
            records.append(record_from_pb(message))
        except InvalidRequest as error:
            _LOG.debug("a worker is not listed: %s", error)
    return records


def _load_from_pb(message: pb.Load) -> Load:
    return Load(
        running=message.running,
        waiting=message.waiting,
        parked=message.parked,
        free_bytes=message.free_bytes,
        budget_bytes=message.budget_bytes,
    )


def listing_to_pb(listing: Listing) -> pb.Listing:
    return pb.Listing(
        workers=[record_to_pb(record) for record in listing.workers],
        closed=sorted(listing.closed),
        settled=listing.settled,
        draining=sorted(listing.draining),
    )


def listing_from_pb(message: pb.Listing) -> Listing:
    return Listing(
        workers=tuple(records_from_pb(message.workers)),
        closed=frozenset(WorkerId(worker) for worker in message.closed),
        settled=message.settled,
        draining=frozenset(WorkerId(worker) for worker in message.draining),
    )


def announcement_to_pb(worker: WorkerId, blocks: Announcement) -> pb.BlockAnnouncement:
    return pb.BlockAnnouncement(
        worker_id=worker,
        since=blocks.since,
        until=blocks.until,
        added=block_keys(blocks.added),
        removed=block_keys(blocks.removed),
    )


def announcement_from_pb(message: pb.BlockAnnouncement) -> Announcement:
    return Announcement(
        since=message.since,
        until=message.until,
        added=tuple(message.added),
        removed=tuple(message.removed),
    )
