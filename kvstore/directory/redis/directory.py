"""The directory in a Redis or Valkey, which outlives the controller and serves several gateways and engines.

Opened by ``connect``. See ``base`` for the contract, and ``scripts`` for the keys. It must not know what
decides the desired state.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from farshore.errors import FarshoreError, InvalidRequest
from farshore.ids import WorkerId
from farshore.kvstore.directory import codec
from farshore.kvstore.directory.base import (
    LEASE_S,
    MOST_BLOCKS,
    MOST_EVENTS,
    SETTLE_S,
    Announcement,
    ClusterEvent,
    Listing,
    WorkerRecord,
    block_keys,
    look_up_keys,
)
from farshore.kvstore.directory.redis import scripts
from farshore.kvstore.directory.redis.address import RedisAddress
from farshore.kvstore.directory.redis.client import RedisClient
from farshore.proto import cluster_pb2 as pb

PIECE_BLOCKS = 500
"""Blocks in one call of an announcement: Redis serves no other call for a few milliseconds."""
PIECE_HASHES = 1_024
"""As PIECE_BLOCKS, of a look-up."""


class _State(NamedTuple):
    text: str | bytes
    revision: int


class RedisDirectory:
    """A :class:`~farshore.kvstore.directory.base.DurableDirectory`. ``lease_s``: shorter in tests."""

    def __init__(
        self,
        address: RedisAddress,
        *,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = address
        self._lease_ms = round(lease_s * 1000)
        self._settle_s = lease_s * SETTLE_S / LEASE_S
        self._clock = clock
        self._client = RedisClient(address)
        self._renew = self._client.script(scripts.RENEW)
        self._withdraw = self._client.script(scripts.WITHDRAW)
        self._mark = self._client.script(scripts.MARK)
        self._store_state = self._client.script(scripts.STORE_STATE)
        self._list = self._client.script(scripts.LIST)
        self._claim = self._client.script(scripts.CLAIM)
        self._announce = self._client.script(scripts.ANNOUNCE)
        self._find = self._client.script(scripts.FIND)
        self._publish = self._client.script(scripts.PUBLISH)
        self._lock = threading.Lock()
        self._listed_s: float | None = None
        self._settles_s = clock()
        self._storing = threading.Lock()
        self._state: _State | None = None
        """The desired state, if this client stored or loaded it."""
        self._published: Sequence[ClusterEvent] = ()
        """What this client published last."""

    def renew(self, record: WorkerRecord) -> None:
        message = codec.record_to_pb(record).SerializeToString()
        self._run(self._renew, record.worker, message, self._lease_ms, scripts.KEEP_MS)

    def withdraw(self, worker: WorkerId) -> None:
        self._run(self._withdraw, worker)

    def close(self, workers: Collection[WorkerId], *, draining: Collection[WorkerId] = ()) -> None:
        marks = json.dumps({"closed": sorted({*workers, *draining}), "draining": sorted(draining)})
        self._run(self._mark, marks)

    def listing(self) -> Listing:
        settled, marks, messages, revision, newest = self._run(
            self._list, self._lease_ms, round(self._settle_s * 1000), scripts.KEEP_MS
        )
        records = codec.records_from_pb(_parsed(messages))
        state = self._state
        if state is not None and state.revision > revision:
            # Redis started empty or with an old copy, or a replica took over that lacks the last writes.
            self._run(self._store_state, state.text, state.revision)
        published = self._published
        if published and published[-1].number > newest:
            with contextlib.suppress(FarshoreError):  # A Redis that is full takes none.
                self._add(published)
        known = frozenset(record.worker for record in records)
        marked = json.loads(marks) if marks else {"closed": (), "draining": ()}
        return Listing(
            workers=tuple(sorted(records, key=lambda record: (record.slot, record.worker))),
            closed=known.intersection(marked["closed"]),
            settled=self._notice_gap() and bool(settled),
            draining=known.intersection(marked["draining"]),
        )

    def announce(self, worker: WorkerId, blocks: Announcement) -> int:
        removed, added = block_keys(blocks.removed), block_keys(blocks.added)
        # The first pieces are of removed blocks: room for the added ones.
        pieces = [((), removed[at : at + PIECE_BLOCKS]) for at in range(0, len(removed), PIECE_BLOCKS)]
        pieces += [(added[at : at + PIECE_BLOCKS], ()) for at in range(0, len(added), PIECE_BLOCKS)]
        pieces = pieces or [((), ())]
        known = blocks.since
        for number, (more, less) in enumerate(pieces, start=1):
            first, last = number == 1, number == len(pieces)
            fixed = (worker, blocks.since, blocks.until, int(first), int(last), MOST_BLOCKS, len(more))
            known = self._run(self._announce, *fixed, scripts.KEEP_MS, *more, *less)
            while known == -1:
                known = self._run(self._announce, *fixed, scripts.KEEP_MS, *more, *less)
            if known != blocks.since:
                break
        return known

    def find_prefix(self, hashes: Sequence[bytes]) -> list[frozenset[WorkerId]]:
        keys = look_up_keys(hashes)
        found: list[frozenset[WorkerId]] = []
        for begin in range(0, len(keys), PIECE_HASHES):
            holders = self._run(self._find, *keys[begin : begin + PIECE_HASHES])
            found += [frozenset(map(WorkerId, text.decode().split())) for text in holders]
        return found

    def disconnect(self) -> None:
        self._client.close()

    def claim(self) -> None:
        """See :class:`~farshore.kvstore.directory.base.DurableDirectory`."""
        end_s = self._clock() + 2 * self._lease_ms / 1000
        while True:
            # Looked at before the list: in a pause after it, leases may run out.
            is_over = self._clock() >= end_s
            workers = self.listing().workers
            if not workers:
                break
            if is_over:
                first = workers[0]
                raise InvalidRequest(
                    f"a cluster named {self._address.cluster} runs with {self._address}: its {first.slot} is "
                    f"at {first.address or first.host}; give this one another name or database"
                )
            time.sleep(self._lease_ms / 20_000)
        self._run(self._claim, scripts.KEEP_MS)

    def load_state(self) -> dict[str, Any] | None:
        keys = [self._key("state"), self._key("revision")]
        text, revision = self._client.call(lambda redis: redis.mget(keys))
        self._state = None if text is None else _State(text, int(revision or 0))
        return (json.loads(text) if text else None) or None

    def store_state(self, state: Mapping[str, Any]) -> None:
        text = json.dumps(state)
        with self._storing:
            before = self._state
            # By the time, so that a number is above those of states that Redis lost, too.
            revision = max(before.revision + 1 if before else 1, round(time.time() * 1000))
            try:
                while (stored := self._run(self._store_state, text, revision)) > revision:
                    revision = stored + 1
            except FarshoreError:
                if before is not None:
                    # A Redis that hangs may run this call later: the state before is to outlast it.
                    self._state = before._replace(revision=revision + 1)
                raise
            self._state = _State(text, revision)

    def publish(self, events: Sequence[ClusterEvent]) -> None:
        self._add(events)
        self._published = events

    def _add(self, events: Sequence[ClusterEvent]) -> None:
        arguments: list[object] = []
        for event in events:
            named = event._asdict() | {"unix_s": repr(event.unix_s)}
            arguments += [named.pop("number"), *(item for pair in named.items() for item in pair)]
        fields = 2 * (len(ClusterEvent._fields) - 1)
        self._run(self._publish, MOST_EVENTS, scripts.EVENTS_MS, fields, *arguments)

    def events(self, since: int = 0) -> list[ClusterEvent]:
        found = self._client.call(
            lambda redis: redis.xrevrange(self._key("events"), min=f"{since + 1}-0", count=MOST_EVENTS)
        )
        return [_event(number, fields) for number, fields in reversed(found)]

    def _key(self, name: str) -> str:
        return self._address.prefix + name

    def _run(self, script: Callable[..., Any], *arguments: object) -> Any:
        return self._client.call(lambda _: script(keys=[self._address.prefix], args=arguments))

    def _notice_gap(self) -> bool:
        """Whether this client has listed the workers without a gap of a lease for as long as a list takes to
        settle: in a gap it could not reach Redis, or was paused itself."""
        with self._lock:
            now_s = self._clock()
            if self._listed_s is not None and now_s - self._listed_s >= self._lease_ms / 1000:
                self._settles_s = now_s + self._settle_s
            self._listed_s = now_s
            return now_s >= self._settles_s


def _parsed(messages: Iterable[bytes]) -> Iterator[pb.WorkerRecord]:
    """The records that are whole: what another program wrote over one costs its worker alone."""
    for message in messages:
        with contextlib.suppress(DecodeError):
            yield pb.WorkerRecord.FromString(message)


def _event(number: bytes, fields: Mapping[bytes, bytes]) -> ClusterEvent:
    texts = {name.decode(): value.decode() for name, value in fields.items()}
    return ClusterEvent(
        number=int(number.partition(b"-")[0]),
        unix_s=float(texts["unix_s"]),
        kind=texts["kind"],
        subject=texts["subject"],
        detail=texts["detail"],
    )
