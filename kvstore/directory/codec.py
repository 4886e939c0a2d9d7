"""Converts directory records and listings to messages and back, for ``remote`` and ``service``."""

from dataclasses import asdict
from typing import get_args

from farshore.ids import WorkerId
from farshore.kvstore.directory.base import Listing, WorkerRecord, WorkerState
from farshore.proto import cluster_pb2 as pb

_STATES: dict[str, WorkerState] = {state: state for state in get_args(WorkerState)}


def record_to_pb(record: WorkerRecord) -> pb.WorkerRecord:
    fields = asdict(record)
    return pb.WorkerRecord(worker_id=fields.pop("worker"), **fields)


def record_from_pb(message: pb.WorkerRecord) -> WorkerRecord:
    return WorkerRecord(
        worker=WorkerId(message.worker_id),
        kind="dense" if message.kind == "dense" else "attention",
        slot=message.slot,
        address=message.address,
        host=message.host,
        process_id=message.process_id,
        state=_STATES[message.state],
        progress=message.progress,
        shards=message.shards,
        failure=message.failure,
    )


def listing_to_pb(listing: Listing) -> pb.Listing:
    return pb.Listing(
        workers=[record_to_pb(record) for record in listing.workers],
        closed=sorted(listing.closed),
        settled=listing.settled,
    )


def listing_from_pb(message: pb.Listing) -> Listing:
    return Listing(
        workers=tuple(record_from_pb(record) for record in message.workers),
        closed=frozenset(WorkerId(worker) for worker in message.closed),
        settled=message.settled,
    )
