"""Bulk KV past gRPC, shard's end: the thread that serves one engine's connection. See :mod:`bulk`.

Nothing that comes in touches a span before the store has looked at it: a piece is received whole, then
written as any other write is.
"""

import socket
from contextlib import suppress

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from farshore.attention_offload import codec
from farshore.attention_offload.shard.engine_holds import EngineHolds
from farshore.attention_offload.transport.bulk import (
    MOST_MESSAGE_BYTES,
    PIECE_BYTES,
    BulkSocket,
    Head,
    Kind,
    Runs,
)
from farshore.errors import InvalidRequest, TransportError
from farshore.ids import Epoch, SequenceId, SpanId
from farshore.interpreter import make_nicer
from farshore.kvstore.store.forms import stored_bytes
from farshore.kvstore.store.store import LocalStore
from farshore.proto import attention_pb2 as pb

MOST_PIECE_BYTES = 16 * PIECE_BYTES
"""What a buffer is kept for; more than PIECE_BYTES are asked for by one token of a very wide model."""

MOST_PAYLOAD_BYTES = 1 << 40
DEADLINE_S = 30.0
"""Without any byte moving, inside of a message or a piece."""

NICENESS = 5
"""A thread that moves bulk KV gives way to one that answers a hot frame."""


def serve_bulk(store: LocalStore, holds: EngineHolds, connection: socket.socket, unix: bool) -> None:
    """Answer one engine's writes and pulls until it hangs up, or sends what cannot be a message."""
    make_nicer(NICENESS)
    wire = BulkSocket(connection, deadline_s=DEADLINE_S)
    served = _Connection(store, holds, wire)
    try:
        while True:
            served.answer()
    except ConnectionError as error:
        with suppress(OSError):
            wire.send(Kind.FAILED, codec.failure_to_pb(TransportError(str(error))))
        raise


class _Connection:
    def __init__(self, store: LocalStore, holds: EngineHolds, wire: BulkSocket) -> None:
        self._store = store
        self._holds = holds
        self._wire = wire
        self._buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8)

    def answer(self) -> None:
        head = self._wire.receive(idle=True)
        if head.payload_bytes > MOST_PAYLOAD_BYTES or head.kind not in (Kind.WRITE, Kind.READ):
            raise ConnectionError(f"garbage: {head.kind.name} with {head.payload_bytes} bytes, to a shard")
        self._unread_bytes = head.payload_bytes
        try:
            (self._write if head.kind is Kind.WRITE else self._read)(head)
        except OSError:
            raise
        except Exception as error:
            # The engine reads an answer when it has sent all.
            while self._unread_bytes:
                self._receive(min(self._unread_bytes, PIECE_BYTES))
            error = InvalidRequest(str(error)) if isinstance(error, DecodeError) else error
            failure = codec.failure_to_pb(error)
            failure.message = failure.message[: MOST_MESSAGE_BYTES // 8]
            self._wire.send(Kind.FAILED, failure)
        else:
            self._wire.send(Kind.DONE)

    def _write(self, head: Head) -> None:
        message = pb.BulkWrite.FromString(head.message)
        request, token_major = message.write, message.token_major
        self._holds.renew(request.caller.engine)
        span, sequence = SpanId(request.span_id), SequenceId(request.sequence_id)
        layout = self._store.look_up(span, holder=sequence).layout
        row_bytes = stored_bytes(layout)
        k_bytes, v_bytes = layout.k_heads * row_bytes[0], layout.v_heads * row_bytes[1]
        if head.payload_bytes != request.tokens * (k_bytes + v_bytes):
            raise InvalidRequest(
                f"{head.payload_bytes} bytes for {request.tokens} tokens of {k_bytes + v_bytes}"
            )
        if not 0 < message.piece_tokens * (k_bytes + v_bytes) <= MOST_PIECE_BYTES + k_bytes + v_bytes:
            raise InvalidRequest(f"pieces of {message.piece_tokens} tokens: {MOST_PIECE_BYTES} bytes at most")
        # At least one write: the store checks a range even where it is empty.
        for first in range(0, request.tokens, message.piece_tokens) or (0,):
            count = min(message.piece_tokens, request.tokens - first)
            piece = self._receive(count * (k_bytes + v_bytes))
            k, v = piece.split((count * k_bytes, count * v_bytes))
            self._store.write(
                span,
                request.layer,
                request.first + first,
                _shaped(k, layout.k_heads, count, row_bytes[0], token_major),
                _shaped(v, layout.v_heads, count, row_bytes[1], token_major),
                sequence=sequence,
                epoch=Epoch(request.epoch),
            )

    def _read(self, head: Head) -> None:
        request = pb.ReadRequest.FromString(head.message)
        self._holds.renew(request.caller.engine)
        span, sequence = SpanId(request.span_id), SequenceId(request.sequence_id)
        layout = self._store.look_up(span, holder=sequence).layout
        piece_tokens = max(1, PIECE_BYTES // layout.layer_token_bytes)
        # At least one read: the store checks a range even where it is empty.
        for first in range(request.first, request.last, piece_tokens) or (request.first,):
            last = min(first + piece_tokens, request.last)
            if layout.format.quantised:
                k, v = self._store.read(
                    span, request.layer, first, last, sequence=sequence, dtype=torch.uint8
                )
                self._send([k.data_ptr(), k.nbytes, v.data_ptr(), v.nbytes])
            else:
                stored = self._store.stored_runs(span, request.layer, first, last, sequence=sequence)
                with stored as runs:
                    self._send(runs)

    def _send(self, piece: Runs) -> None:
        if any(piece[1::2]):
            self._wire.send(Kind.PIECE, payload=piece)

    def _receive(self, count: int) -> Tensor:
        """The next bytes of the payload, until the next call."""
        if count > self._buffer.nbytes:
            self._buffer = torch.empty(count, dtype=torch.uint8)
        self._wire.receive_payload([self._buffer.data_ptr(), count])
        self._unread_bytes -= count
        return self._buffer[:count]


def _shaped(part: Tensor, heads: int, tokens: int, row_bytes: int, token_major: bool) -> Tensor:
    """``u8[heads, tokens, row_bytes]``."""
    if token_major:
        return part.view(tokens, heads, row_bytes).transpose(0, 1)
    return part.view(heads, tokens, row_bytes)
