"""Serves a bulk connection at the shard: reads and writes KV for one engine, or exports spans to a shard.

Called by ``shard.frame_loop``'s listener, in a thread per connection. ``transport.bulk`` defines the messages
and the engine's end. It must not know how blocks are laid out. Received bytes reach a span only through the
store's checks: a piece is received completely into a buffer, then written like any other write.
"""

import socket
from contextlib import suppress

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from farshore.attention_offload import codec
from farshore.attention_offload.shard import exports
from farshore.attention_offload.shard.engine_holds import EngineHolds
from farshore.attention_offload.transport.bulk import (
    MOST_MESSAGE_BYTES,
    PIECE_BYTES,
    BulkKind,
    BulkMessage,
    BulkSocket,
    Runs,
)
from farshore.errors import InvalidRequest, TransportError
from farshore.ids import Epoch, SequenceId, SpanId
from farshore.interpreter import make_nicer
from farshore.kernels.host import HOST, address
from farshore.kvstore.store.layout.forms import stored_bytes
from farshore.kvstore.store.store import LocalStore
from farshore.proto import attention_pb2 as pb

MOST_PIECE_BYTES = 16 * PIECE_BYTES
"""The largest piece of a write, plus one token: a single token of a very wide model exceeds PIECE_BYTES."""

MOST_PAYLOAD_BYTES = 1 << 40
DEADLINE_S = 30.0
"""How long a message or a payload may stand still, without any byte moving."""

NICENESS = 5
"""Added to the thread's nice value, so that threads that answer hot frames run first."""


def serve_bulk(store: LocalStore, holds: EngineHolds, connection: socket.socket, unix: bool) -> None:
    """Answers one engine's writes and pulls until an OSError ends the connection.

    Raises ConnectionError when the engine hangs up or sends malformed data, and another OSError when the
    connection breaks or stands still for DEADLINE_S. ``unix`` is not used; the listener passes it."""
    make_nicer(NICENESS)
    bulk_socket = BulkSocket(connection, deadline_s=DEADLINE_S)
    served = _Connection(store, holds, bulk_socket)
    try:
        while True:
            served.answer()
    except ConnectionError as error:
        with suppress(OSError):
            bulk_socket.send(BulkKind.FAILED, codec.failure_to_pb(TransportError(str(error))))
        raise


class _Connection:
    """Serves the requests of one bulk connection."""

    def __init__(self, store: LocalStore, holds: EngineHolds, bulk_socket: BulkSocket) -> None:
        self._store = store
        self._holds = holds
        self._socket = bulk_socket
        self._buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8, device=HOST)

    def answer(self) -> None:
        """Receives one request and answers it. Sends the store's error as FAILED; raises OSError only."""
        request = self._socket.receive(idle=True)
        serve = {
            BulkKind.WRITE: self._write,
            BulkKind.READ: self._read,
            BulkKind.EXPORT: self._export,
        }.get(request.kind)
        if request.payload_bytes > MOST_PAYLOAD_BYTES or serve is None:
            raise ConnectionError(
                f"garbage: {request.kind.name} with {request.payload_bytes} bytes, to a shard"
            )
        self._unread_bytes = request.payload_bytes
        try:
            serve(request)
        except OSError:
            raise
        except Exception as error:
            # The engine reads the answer only after it has sent its whole payload.
            while self._unread_bytes:
                self._receive(min(self._unread_bytes, PIECE_BYTES))
            error = InvalidRequest(str(error)) if isinstance(error, DecodeError) else error
            failure = codec.failure_to_pb(error)
            failure.message = failure.message[: MOST_MESSAGE_BYTES // 8]
            self._socket.send(BulkKind.FAILED, failure)
        else:
            self._socket.send(BulkKind.DONE)

    def _write(self, received: BulkMessage) -> None:
        message = pb.BulkWrite.FromString(received.message)
        request, token_major = message.write, message.token_major
        self._holds.renew(request.caller.engine)
        span, sequence = SpanId(request.span_id), SequenceId(request.sequence_id)
        layout = self._store.look_up(span, holder=sequence).layout
        row_bytes = stored_bytes(layout)
        k_bytes, v_bytes = layout.k_heads * row_bytes[0], layout.v_heads * row_bytes[1]
        if received.payload_bytes != request.tokens * (k_bytes + v_bytes):
            raise InvalidRequest(
                f"{received.payload_bytes} bytes for {request.tokens} tokens of {k_bytes + v_bytes}"
            )
        if not 0 < message.piece_tokens * (k_bytes + v_bytes) <= MOST_PIECE_BYTES + k_bytes + v_bytes:
            raise InvalidRequest(f"pieces of {message.piece_tokens} tokens: {MOST_PIECE_BYTES} bytes at most")
        # At least one write, so that the store checks an empty range too.
        for first in range(0, request.tokens, message.piece_tokens) or (0,):
            count = min(message.piece_tokens, request.tokens - first)
            piece = self._receive(count * (k_bytes + v_bytes))
            k, v = piece.split((count * k_bytes, count * v_bytes))
            self._store.write(
                span,
                request.layer,
                request.first_token + first,
                _shaped(k, layout.k_heads, count, row_bytes[0], token_major),
                _shaped(v, layout.v_heads, count, row_bytes[1], token_major),
                sequence=sequence,
                epoch=Epoch(request.epoch),
            )

    def _read(self, received: BulkMessage) -> None:
        request = pb.ReadRequest.FromString(received.message)
        self._holds.renew(request.caller.engine)
        span, sequence = SpanId(request.span_id), SequenceId(request.sequence_id)
        layout = self._store.look_up(span, holder=sequence).layout
        piece_tokens = max(1, PIECE_BYTES // layout.layer_token_bytes)
        # At least one read, so that the store checks an empty range too.
        for first in range(request.first_token, request.end_token, piece_tokens) or (request.first_token,):
            last = min(first + piece_tokens, request.end_token)
            with self._store.stored_runs(span, request.layer, first, last, sequence=sequence) as runs:
                self._send(runs)

    def _export(self, received: BulkMessage) -> None:
        for piece, payload in exports.pieces(self._store, pb.ExportRequest.FromString(received.message)):
            self._socket.send(BulkKind.PIECE, piece, [address(payload), payload.nbytes])

    def _send(self, piece: Runs) -> None:
        if any(piece[1::2]):
            self._socket.send(BulkKind.PIECE, payload=piece)

    def _receive(self, count: int) -> Tensor:
        """Receives the next ``count`` bytes of the payload: ``u8[count]``, valid until the next call."""
        if count > self._buffer.nbytes:
            self._buffer = torch.empty(count, dtype=torch.uint8, device=HOST)
        self._socket.receive_payload([address(self._buffer), count])
        self._unread_bytes -= count
        return self._buffer[:count]


def _shaped(kv: Tensor, heads: int, tokens: int, row_bytes: int, token_major: bool) -> Tensor:
    """Views received K or V bytes as ``u8[heads, tokens, row_bytes]``."""
    if token_major:
        return kv.view(tokens, heads, row_bytes).transpose(0, 1)
    return kv.view(heads, tokens, row_bytes)
