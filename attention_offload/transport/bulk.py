"""Bulk KV past gRPC: writes and pulls on a connection of their own, so that no hot frame waits behind them.

A message is a header ``kind u8, 3 unused, message bytes u32, payload bytes u64``, little-endian, a protobuf
message, and the payload: KV as stored (:mod:`farshore.kvstore.store.forms`). A request is answered before
the next one is sent::

    WRITE BulkWrite, payload: all pieces  ──▶
                                          ◀──  DONE                    | FAILED Failure
    READ ReadRequest                      ──▶
                                          ◀──  PIECE, payload ... DONE | FAILED Failure

The engine's payloads go from and to where its tensors are. The shard moves a piece at a time between the
socket and a buffer that stays in a core's cache, and between that and the blocks. Who is slow to read lets
the other end's socket buffer fill up, and so makes it wait. Engine's end; the shard's is ``bulk_server``. The
moving is native, without the interpreter's lock.
"""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import NamedTuple

import torch
from google.protobuf.message import Message
from torch import Tensor

from farshore.attention_offload import codec
from farshore.attention_offload.transport.frames import native
from farshore.errors import TransportError
from farshore.proto import attention_pb2 as pb

PIECE_BYTES = 1 << 20
"""About; of a write and of a pull. It fits into a core's cache, and bounds how long anybody holds a lock."""

MOST_MESSAGE_BYTES = 64 << 10

Runs = list[int]
"""Stretches of memory, one after the other: address, bytes, address, bytes, ..."""

_HEADER = struct.Struct("<B3xIQ")


class Kind(IntEnum):
    WRITE = 1
    READ = 2
    PIECE = 3
    DONE = 4
    FAILED = 5


class Head(NamedTuple):
    """A message, its payload still to be received."""

    kind: Kind
    message: bytes
    payload_bytes: int


class BulkSocket:
    """Messages on a connection that it owns from now on. Not thread-safe. ``deadline_s``: how long a transfer
    may stand still, without any byte moving.

    OSError where the connection breaks or is late, ConnectionError also for what cannot be a message: it is
    then of no more use.
    """

    def __init__(self, connection: socket.socket, *, deadline_s: float) -> None:
        self._connection = connection
        self._deadline_s = deadline_s
        self._fd = connection.fileno()
        self._native = native()
        self._head = bytearray(_HEADER.size)
        self._head_run = _run(self._head)

    def send(self, kind: Kind, message: Message | None = None, payload: Runs | None = None) -> None:
        text = message.SerializeToString() if message is not None else b""
        payload = payload or []
        head = bytearray(_HEADER.pack(kind, len(text), sum(payload[1::2])) + text)
        self._native.send_pieces(self._fd, _run(head) + payload, self._deadline_s)

    def receive(self, *, idle: bool = False) -> Head:
        """The next message; :meth:`receive_payload` takes what comes behind it. ``idle``: none is due, so
        wait for ever."""
        self._native.receive_pieces(self._fd, self._head_run, -1.0 if idle else self._deadline_s)
        number, message_bytes, payload_bytes = _HEADER.unpack(self._head)
        try:
            kind = Kind(number)
        except ValueError:
            raise ConnectionError(f"garbage: a bulk message of kind {number}") from None
        if message_bytes > MOST_MESSAGE_BYTES:
            raise ConnectionError(
                f"oversized: a bulk message of {message_bytes} bytes, where {MOST_MESSAGE_BYTES} are the most"
            )
        message = bytearray(message_bytes)
        if message:
            self._native.receive_pieces(self._fd, _run(message), self._deadline_s)
        return Head(kind, bytes(message), payload_bytes)

    def receive_payload(self, runs: Runs) -> None:
        self._native.receive_pieces(self._fd, runs, self._deadline_s)

    def close(self) -> None:
        self._connection.close()


class BulkStream:
    """One connection for bulk KV, engine's end. Not thread-safe. TransportError leaves it useless; what the
    shard refuses, raised as the store itself would, does not."""

    def __init__(self, connection: socket.socket, address: str, *, deadline_s: float) -> None:
        self._wire = BulkSocket(connection, deadline_s=deadline_s)
        self._address = address
        self._deadline_s = deadline_s

    def write(self, request: pb.WriteRequest, k: Tensor, v: Tensor) -> None:
        """k and v as stored, ``u8[heads, tokens, bytes]``, any strides; the request is without them."""
        token_major = not k.is_contiguous() and k.transpose(0, 1).is_contiguous()
        if token_major:
            k, v = k.transpose(0, 1), v.transpose(0, 1)
        k, v = k.contiguous(), v.contiguous()
        piece_tokens = max(1, PIECE_BYTES // (token_bytes(k, token_major) + token_bytes(v, token_major)))
        payload: Runs = []
        for first in range(0, request.tokens, piece_tokens):
            last = min(first + piece_tokens, request.tokens)
            payload += runs(k, first, last, token_major) + runs(v, first, last, token_major)
        message = pb.BulkWrite(write=request, piece_tokens=piece_tokens, token_major=token_major)
        with self._mapped():
            self._wire.send(Kind.WRITE, message, payload)
            self._answer(Kind.DONE)

    def read(self, request: pb.ReadRequest, k: Tensor, v: Tensor) -> None:
        """Into k and v as stored, ``u8[heads, request.last - request.first, bytes]``, contiguous."""
        tokens, at = max(0, request.last - request.first), 0
        each = token_bytes(k, False) + token_bytes(v, False)
        with self._mapped():
            self._wire.send(Kind.READ, request)
            while (head := self._answer(Kind.PIECE, Kind.DONE)).kind is Kind.PIECE:
                count, rest = divmod(head.payload_bytes, each)
                if rest or not 0 < count <= tokens - at:
                    raise ConnectionError(
                        f"garbage: a piece of {head.payload_bytes} bytes, {tokens - at} tokens are due"
                    )
                self._wire.receive_payload(runs(k, at, at + count, False) + runs(v, at, at + count, False))
                at += count
            if at != tokens:
                raise ConnectionError(f"truncated: {at} tokens of {tokens}")

    def close(self) -> None:
        self._wire.close()

    def _answer(self, *due: Kind) -> Head:
        head = self._wire.receive()
        if head.kind is Kind.FAILED:
            raise codec.error_from_bytes(head.message, client=self._address)
        if head.kind not in due:
            raise ConnectionError(f"reordered: {head.kind.name}, due is {' or '.join(it.name for it in due)}")
        return head

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise TransportError(
                f"{self._address}: no progress of bulk KV within {self._deadline_s:g} s"
            ) from error
        except OSError as error:
            raise TransportError(f"{self._address}: bulk KV: {error}") from error


def _run(data: bytearray) -> Runs:
    return [torch.frombuffer(data, dtype=torch.uint8).data_ptr(), len(data)]


def token_bytes(part: Tensor, token_major: bool) -> int:
    """Of one token in all heads."""
    heads = part.shape[1] if token_major else part.shape[0]
    return heads * part.shape[2]


def runs(part: Tensor, first: int, last: int, token_major: bool) -> Runs:
    """Tokens ``first .. last`` of a contiguous ``u8[heads, tokens, bytes]`` or ``[tokens, heads, bytes]``."""
    base = part.data_ptr()
    if token_major:
        token = part.shape[1] * part.shape[2]
        return [base + first * token, (last - first) * token]
    heads, tokens, row = part.shape
    if not row:
        return []
    if last - first == tokens:
        return [base, heads * tokens * row]
    flat: Runs = []
    for head in range(heads):
        flat += (base + (head * tokens + first) * row, (last - first) * row)
    return flat
