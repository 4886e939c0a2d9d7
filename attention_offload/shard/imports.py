"""Copies sealed spans of other shards into this shard's store.

Called by ``shard.service``; the other end is ``shard.exports``. It must not know why a span is copied or
which engine asked.

A copy is made once, in a thread of its own, however many callers ask for it. This module holds it for KEEP_S
after each call, so that the callers can make their sequences hold it. Then it lives by the rules of any other
span, and is found again for as long as it lives. An export is received piece by piece; every piece, and the
digest of the whole, are checked before the copy can be found or held. A copy that fails leaves nothing.
"""

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as WaitTimeout
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import grpc

from farshore.attention_offload import codec
from farshore.attention_offload.base import Imported
from farshore.attention_offload.shard import checks
from farshore.attention_offload.shard.rests import Rests
from farshore.attention_offload.transport.bulk import MOST_EXPORT_PIECE_BYTES, BulkConnection
from farshore.attention_offload.transport.connect import Dialler, shard_error
from farshore.attention_offload.transport.core_sharing import usable_cores
from farshore.attention_offload.transport.frames import REMOTE
from farshore.cluster_token import ClusterToken
from farshore.errors import Cancelled, Corrupt, DeadlineExceeded, NotFound, Overloaded, TransportError
from farshore.ids import Epoch, SequenceId, SpanId
from farshore.interpreter import make_nicer
from farshore.kvstore.base import Digest, ExportChunk
from farshore.kvstore.prefix import PrefixBlock
from farshore.kvstore.store import transfer
from farshore.kvstore.store.store import LocalStore
from farshore.kvstore.store.transfer import ChunkImage
from farshore.proto import attention_pb2 as pb
from farshore.proto import attention_pb2_grpc as pb_grpc
from farshore.rpc import channel

MOST_COPYING = 2
"""Copies that are made at a time. Each has one piece in memory."""
MOST_UNFINISHED = 32
"""Copies that are made or wait; further ones are refused with Overloaded."""
MOST_REMEMBERED = 4096
"""Copies that are found again."""
PROGRESS_S = 5.0
"""How long the other shard may send nothing, and the deadline for connecting to it."""
GRPC_DEADLINE_S = 60.0
"""The deadline of a whole export over gRPC, which has none on progress."""
KEEP_S = 10.0
"""How long a copy is held after a call, for its sequences to hold it."""
NICENESS = 5
"""Added to the copying threads' nice values, so that threads that answer hot frames run first."""

SHARE_OF_CORES = 0.05
"""How much of this process's cores all copying threads together take. In drains on two busy cores the p99 of
the gaps between tokens was 0.8 times that without a drain, and 2.3 times without these rests."""
MOST_REST_S = 1.5
"""How long the rests of one copy take at most, so that large spans and the copies that wait behind them are
made before their callers give up."""

_EPOCH = Epoch(0)


class _Piece(NamedTuple):
    """A piece of an export as it was received."""

    chunk: ExportChunk
    blocks: list[PrefixBlock]
    digest: Digest
    """Of the whole export; empty except in its first piece."""


class _Copy:
    """One copy: under way, made or failed."""

    def __init__(self) -> None:
        self.made: Future[Imported] = Future()
        self.callers = 0
        """Calls that wait for it now. A copy under way ends when there is none."""
        self.ended = False
        """Whether the copy has to fail."""
        self.keep_until_s: float | None = None
        """When this module gives its hold back; None if it has none."""


class SpanImports:
    """The imports of one shard. Thread-safe. ``token`` is the cluster's, proved to other shards; ``clock``
    gives monotonic seconds. ``wait``: called with the seconds of a copying thread's rest; None: it rests
    until the copies are ended."""

    def __init__(
        self,
        store: LocalStore,
        *,
        token: ClusterToken | None = None,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        self._store = store
        self._token = token
        self._clock = clock
        self._holder = SequenceId(f"imports of {secrets.token_hex(8)}")
        """Holds the copies; unlike a sequence's, its holds are under no engine's lease."""
        self._lock = threading.Lock()
        """Held for no longer than a change of holds takes."""
        self._copies: OrderedDict[SpanId, _Copy] = OrderedDict()
        """By the span that was copied; least recently asked for first."""
        self._ending = threading.Event()
        self._wait = wait or self._ending.wait
        self._copiers = ThreadPoolExecutor(
            MOST_COPYING, thread_name_prefix="import", initializer=lambda: make_nicer(NICENESS)
        )

    def import_span(self, request: pb.ImportRequest, *, deadline_s: float) -> Imported:
        """The copy of the requested span. Blocks until it is made, for ``deadline_s`` at most.

        Raises Full if there is no room, Overloaded if MOST_UNFINISHED copies are not made yet, Corrupt if
        other bytes were received than were sealed, TransportError if the other shard does not answer, and
        what it answers otherwise: NotFound, InvalidRequest."""
        checks.check_id("a sequence id", request.span.sequence_id)
        copy = self._copy_for(request)
        try:
            imported = copy.made.result(deadline_s)
            self._keep(copy, imported)
            return imported
        except WaitTimeout:
            raise DeadlineExceeded(f"{request.span.span_id} was not copied within {deadline_s:g} s") from None
        finally:
            with self._lock:
                copy.callers -= 1

    def tick(self) -> None:
        """Gives back the holds on copies that were not asked for within KEEP_S. Call it every second."""
        now_s = self._clock()
        with self._lock:
            kept = [copy for copy in self._copies.values() if copy.keep_until_s is not None]
            for copy in kept:
                if not copy.callers and copy.keep_until_s is not None and copy.keep_until_s <= now_s:
                    self._give_up(copy)
            for source in list(self._copies)[: max(0, len(self._copies) - MOST_REMEMBERED)]:
                if self._copies[source].made.done() and self._copies[source].keep_until_s is None:
                    del self._copies[source]

    def end_copies(self) -> None:
        """Lets the copies that are not made yet fail, those under way after their present piece."""
        with self._lock:
            for copy in self._copies.values():
                copy.ended = True
        self._ending.set()

    def _copy_for(self, request: pb.ImportRequest) -> _Copy:
        """The copy that answers the request, under way or made, with one more caller."""
        source = SpanId(request.span.span_id)
        with self._lock:
            copy = self._copies.get(source)
            if copy is None or not self._answers(copy, request.span.tokens):
                if self._unfinished() >= MOST_UNFINISHED:
                    raise Overloaded(f"{MOST_UNFINISHED} spans wait to be copied: try again in a second")
                if copy is not None and copy.keep_until_s is not None:
                    self._give_up(copy)
                copy = self._copies[source] = _Copy()
                copy.callers = 1
                self._copiers.submit(self._make, copy, request)
            else:
                copy.callers += 1
            self._copies.move_to_end(source)
            return copy

    def _answers(self, copy: _Copy, tokens: int) -> bool:
        """Whether the copy is under way, or is in the store with ``tokens`` tokens or more."""
        if not copy.made.done():
            return True
        if copy.made.cancelled() or copy.made.exception() is not None or copy.made.result().tokens < tokens:
            return False
        try:
            self._store.hold([copy.made.result().span], sequence=self._holder, epoch=_EPOCH)
        except NotFound:
            copy.keep_until_s = None
            return False
        copy.keep_until_s = self._clock() + KEEP_S
        return True

    def _unfinished(self) -> int:
        return sum(not copy.made.done() for copy in self._copies.values())

    def _keep(self, copy: _Copy, imported: Imported) -> None:
        with self._lock:
            self._store.hold([imported.span], sequence=self._holder, epoch=_EPOCH)
            copy.keep_until_s = self._clock() + KEEP_S

    def _give_up(self, copy: _Copy) -> None:
        copy.keep_until_s = None
        self._store.drop([copy.made.result().span], sequence=self._holder, epoch=_EPOCH)

    # -- in a copying thread -------------------------------------------------------------------------------

    def _make(self, copy: _Copy, request: pb.ImportRequest) -> None:
        try:
            self._check_wanted(copy)
            with _export(request, self._token) as pieces:
                imported = self._store_copy(copy, pieces)
        except Exception as error:
            copy.made.set_exception(error)
            return
        with self._lock:
            copy.keep_until_s = self._clock() + KEEP_S
            copy.made.set_result(imported)

    @staticmethod
    def _check_wanted(copy: _Copy) -> None:
        if not copy.callers or copy.ended:
            raise Cancelled("every caller of this import has given up, or the shard is stopping")

    def _store_copy(self, copy: _Copy, pieces: Iterator[_Piece]) -> Imported:
        """Stores an export and names its blocks. After any exception nothing is kept."""
        names: list[PrefixBlock] = []
        first = next(pieces, None)
        if first is None:
            raise Corrupt("an export without a piece: ask for it again")

        def chunks() -> Iterator[ExportChunk]:
            for piece in chain((first,), pieces):
                self._check_wanted(copy)
                names.extend(piece.blocks)
                yield piece.chunk

        received = transfer.verified_images(chunks())
        images = transfer.with_digest_check(received, first.digest, "the imported span")
        span = self._store.import_images(self._rested(_checked(images)), sequence=self._holder, epoch=_EPOCH)
        key, layout = self._store.look_up(span, holder=self._holder)
        tokens, _ = self._store.sealed(span, holder=self._holder)
        try:
            blocks = checks.check_blocks(names)
            self._store.seal(span, tokens, sequence=self._holder, epoch=_EPOCH, blocks=blocks)
        except BaseException:
            self._store.drop([span], sequence=self._holder, epoch=_EPOCH)
            raise
        return Imported(span, key, layout, tokens)

    def _rested(self, images: Iterator[ChunkImage]) -> Iterator[ChunkImage]:
        """The images of one export, with a rest after each."""
        share = SHARE_OF_CORES * len(usable_cores()) / MOST_COPYING
        rests = Rests(share=share, most_s=MOST_REST_S, wait=self._wait)
        for image in images:
            yield image
            rests.after(image.image.nbytes / (image.header.tokens * image.header.layout.token_bytes))


def _checked(images: Iterable[ChunkImage]) -> Iterator[ChunkImage]:
    for image in images:
        checks.check_key(image.header.key)
        yield image


@contextmanager
def _export(request: pb.ImportRequest, token: ClusterToken | None) -> Iterator[Iterator[_Piece]]:
    """The pieces of the export that the request asks another shard for, over the fastest transport."""
    with channel(request.address, token) as source:
        stub = pb_grpc.AttentionStub(source)
        dialler = Dialler(stub, request.address, REMOTE, token=token, purpose="imported KV comes")
        connected = dialler.connect(None, deadline_s=PROGRESS_S)
        if connected is None:
            yield _over_grpc(stub, request)
            return
        connection = BulkConnection(connected.connection, request.address, deadline_s=PROGRESS_S)
        try:
            yield (_piece(*received) for received in connection.export(request.span))
        finally:
            connection.close()


def _over_grpc(stub: pb_grpc.AttentionStub, request: pb.ImportRequest) -> Iterator[_Piece]:
    """A stream has no deadline on progress, so each piece is waited for by the clock of the whole."""
    try:
        stream = stub.Export(request.span, timeout=GRPC_DEADLINE_S)
        for piece in stream:
            if piece.payload_bytes > MOST_EXPORT_PIECE_BYTES:
                raise TransportError(f"{request.address}: oversized: a piece of {piece.payload_bytes} bytes")
            payload = bytearray(piece.payload)
            while len(payload) < piece.payload_bytes:
                payload += next(stream, pb.ExportPiece()).payload or _truncated(request.address)
            yield _piece(piece, memoryview(payload))
    except grpc.RpcError as failure:
        raise shard_error(failure, request.address) from failure


def _truncated(address: str) -> bytes:
    raise TransportError(f"{address}: truncated: an exported piece without its end")


def _piece(message: pb.ExportPiece, payload: memoryview) -> _Piece:
    chunk = ExportChunk(header=message.header, payload=payload, checksum=message.checksum)
    return _Piece(chunk, [codec.block_from_pb(block) for block in message.blocks], Digest(message.digest))
