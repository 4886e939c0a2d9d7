"""Transfers bulk KV (writes and pulls) on a native connection of its own, so that no hot frame waits for it.

Called by ``client.bulk_link`` at the engine's end, and by ``shard.imports``; the answering end is
``shard.bulk_loop``. It must not know the store.

A message is a little-endian header ``kind u8, 3 unused, message bytes u32, payload bytes u64``, a protobuf
message, and the payload: KV as stored (:mod:`farshore.kvstore.store.layout.forms`). Each request is answered
before the next one is sent::

    WRITE BulkWrite, payload: all pieces  ──▶
                                          ◀──  DONE                    | FAILED Failure
    READ ReadRequest                      ──▶
                                          ◀──  PIECE, payload ... DONE | FAILED Failure
    EXPORT ExportRequest                  ──▶
                                          ◀──  PIECE ExportPiece, payload ... DONE | FAILED Failure

An engine writes and reads; a shard that imports a span asks another shard for an export. The engine's
payloads are sent from its tensors and received into them. The shard moves one piece at a time between the
socket and a buffer that fits into a core's cache, and between that buffer and the blocks; exported pieces are
sent from the blocks. A slow reader fills the sender's socket buffer and so blocks the sender. Native code
moves the bytes, without the interpreter's lock.
"""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import NamedTuple

import torch
from google.protobuf.message import DecodeError, Message
from torch import Tensor

from farshore.attention_offload import codec
from farshore.attention_offload.transport.frames import native
from farshore.errors import TransportError
from farshore.kernels.host import address
from farshore.proto import attention_pb2 as pb

PIECE_BYTES = 1 << 20
"""The approximate size of a piece. It fits into a core's cache, and bounds how long any lock is held."""

MOST_EXPORT_PIECE_BYTES = 256 << 20
"""The largest payload of an exported piece: one layer of one block of a very wide model."""

MOST_MESSAGE_BYTES = 64 << 10
"""The largest protobuf message; a longer one is refused."""

Runs = list[int]
"""Adjacent bytes in memory, run after run: address, bytes, address, bytes, ..."""

_HEADER = struct.Struct("<B3xIQ")


class BulkKind(IntEnum):
    """The kinds of messages, as numbered in a message's header."""

    WRITE = 1
    READ = 2
    PIECE = 3
    DONE = 4
    FAILED = 5
    EXPORT = 6


class BulkMessage(NamedTuple):
    """A received message. Its payload is still to be received."""

    kind: BulkKind
    message: bytes
    payload_bytes: int


class BulkSocket:
    """Sends and receives messages; used by both ends. It owns ``connection``. Not thread-safe.

    A transfer raises TimeoutError if no byte moves for ``deadline_s``, ConnectionError if malformed data
    arrives, and another OSError if the connection breaks. The connection cannot be used after any of them.
    """

    def __init__(self, connection: socket.socket, *, deadline_s: float) -> None:
        self._connection = connection
        self._deadline_s = deadline_s
        self._fd = connection.fileno()
        self._native = native()
        self._header = bytearray(_HEADER.size)
        self._header_run = _run_of(self._header)

    def send(self, kind: BulkKind, message: Message | None = None, payload: Runs | None = None) -> None:
        """Sends a message. Its payload is the bytes at ``payload``, in order."""
        text = message.SerializeToString() if message is not None else b""
        payload = payload or []
        start = bytearray(_HEADER.pack(kind, len(text), sum(payload[1::2])) + text)
        self._native.send_pieces(self._fd, _run_of(start) + payload, self._deadline_s)

    def receive(self, *, idle: bool = False) -> BulkMessage:
        """Receives the next message without its payload, for which the caller calls :meth:`receive_payload`.

        If ``idle``, no message is due, and the wait for its header has no deadline."""
        self._native.receive_pieces(self._fd, self._header_run, -1.0 if idle else self._deadline_s)
        number, message_bytes, payload_bytes = _HEADER.unpack(self._header)
        try:
            kind = BulkKind(number)
        except ValueError:
            raise ConnectionError(f"garbage: a bulk message of kind {number}") from None
        if message_bytes > MOST_MESSAGE_BYTES:
            raise ConnectionError(
                f"oversized: a bulk message of {message_bytes} bytes, where {MOST_MESSAGE_BYTES} are the most"
            )
        message = bytearray(message_bytes)
        if message:
            self._native.receive_pieces(self._fd, _run_of(message), self._deadline_s)
        return BulkMessage(kind, bytes(message), payload_bytes)

    def receive_payload(self, runs: Runs) -> None:
        """Receives the next bytes of the current payload into ``runs``, in order."""
        self._native.receive_pieces(self._fd, runs, self._deadline_s)

    def close(self) -> None:
        self._connection.close()


class BulkConnection:
    """The engine's end of a connection for bulk KV. Not thread-safe.

    A call raises TransportError if the connection breaks, stands still for ``deadline_s``, or delivers
    malformed data; the connection cannot be used afterwards. It raises the store's own error if the shard
    refuses the request; the connection stays usable.
    """

    def __init__(self, connection: socket.socket, address: str, *, deadline_s: float) -> None:
        self._socket = BulkSocket(connection, deadline_s=deadline_s)
        self._address = address
        self._deadline_s = deadline_s

    def write(self, request: pb.WriteRequest, k: Tensor, v: Tensor) -> None:
        """Writes k and v to the span and layer that ``request`` names.

        k and v are as stored, ``u8[heads, request.tokens, bytes]`` with any strides. ``request`` carries no
        KV itself."""
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
            self._socket.send(BulkKind.WRITE, message, payload)
            self._receive_answer(BulkKind.DONE)

    def read(self, request: pb.ReadRequest, k: Tensor, v: Tensor) -> None:
        """Pulls the tokens that ``request`` names into k and v.

        k and v are as stored, contiguous ``u8[heads, request.end_token - request.first_token, bytes]``. Their
        contents are undefined after an error."""
        tokens, done = max(0, request.end_token - request.first_token), 0
        bytes_per_token = token_bytes(k, False) + token_bytes(v, False)
        with self._mapped():
            self._socket.send(BulkKind.READ, request)
            while (answer := self._receive_answer(BulkKind.PIECE, BulkKind.DONE)).kind is BulkKind.PIECE:
                count, rest = divmod(answer.payload_bytes, bytes_per_token)
                if rest or not 0 < count <= tokens - done:
                    raise ConnectionError(
                        f"garbage: a piece of {answer.payload_bytes} bytes, {tokens - done} tokens are due"
                    )
                self._socket.receive_payload(
                    runs(k, done, done + count, False) + runs(v, done, done + count, False)
                )
                done += count
            if done != tokens:
                raise ConnectionError(f"truncated: {done} tokens of {tokens}")

    def export(self, request: pb.ExportRequest) -> Iterator[tuple[pb.ExportPiece, memoryview]]:
        """Asks a shard for an export. Yields its pieces with their payloads, each valid until the next one is
        taken. Unless the iterator was exhausted, the connection cannot be used afterwards."""
        buffer = bytearray(PIECE_BYTES)
        with self._mapped():
            self._socket.send(BulkKind.EXPORT, request)
            while (answer := self._receive_answer(BulkKind.PIECE, BulkKind.DONE)).kind is BulkKind.PIECE:
                if answer.payload_bytes > MOST_EXPORT_PIECE_BYTES:
                    raise ConnectionError(f"oversized: a piece of {answer.payload_bytes} bytes")
                if answer.payload_bytes > len(buffer):
                    buffer = bytearray(answer.payload_bytes)
                payload = memoryview(buffer)[: answer.payload_bytes]
                if payload:
                    self._socket.receive_payload([_address(buffer), len(payload)])
                try:
                    piece = pb.ExportPiece.FromString(answer.message)
                except DecodeError as error:
                    raise ConnectionError(f"garbage: {error}") from None
                yield piece, payload

    def close(self) -> None:
        self._socket.close()

    def _receive_answer(self, *due: BulkKind) -> BulkMessage:
        """Receives an answer of one of the kinds ``due``; raises the error that a FAILED message carries."""
        answer = self._socket.receive()
        if answer.kind is BulkKind.FAILED:
            raise codec.error_from_bytes(answer.message, peer=self._address)
        if answer.kind not in due:
            names = " or ".join(kind.name for kind in due)
            raise ConnectionError(f"reordered: {answer.kind.name}, due is {names}")
        return answer

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        """Turns an OSError into a TransportError."""
        try:
            yield
        except TimeoutError as error:
            raise TransportError(
                f"{self._address}: no progress of bulk KV within {self._deadline_s:g} s"
            ) from error
        except OSError as error:
            raise TransportError(f"{self._address}: bulk KV: {error}") from error


def _address(data: bytearray) -> int:
    return address(torch.frombuffer(data, dtype=torch.uint8))


def _run_of(data: bytearray) -> Runs:
    return [_address(data), len(data)]


def token_bytes(kv: Tensor, token_major: bool) -> int:
    """The bytes of one token, over all heads, in a K or V tensor as :func:`runs` takes it."""
    heads = kv.shape[1] if token_major else kv.shape[0]
    return heads * kv.shape[2]


def runs(kv: Tensor, first: int, last: int, token_major: bool) -> Runs:
    """The runs of tokens ``first .. last`` (end not included) in a contiguous K or V tensor.

    ``kv`` is ``u8[tokens, heads, bytes]`` if ``token_major``, else ``u8[heads, tokens, bytes]``."""
    base = address(kv)
    if token_major:
        token = kv.shape[1] * kv.shape[2]
        return [base + first * token, (last - first) * token]
    heads, tokens, row = kv.shape
    if not row:
        return []
    if last - first == tokens:
        return [base, heads * tokens * row]
    flat: Runs = []
    for head in range(heads):
        flat += (base + (head * tokens + first) * row, (last - first) * row)
    return flat
