"""The handshake on a new native connection: both ends prove the cluster token (invariant 12).

Called by ``transport.connect`` at the engine's end and by ``shard.frame_loop`` at the shard's. It must not
know what the connection carries. All fields have fixed lengths::

    engine to shard    offer 16, random 32       the offer that the shard made over gRPC
    shard to engine    random 32, proof 32
    engine to shard    proof 32
    shard to engine    WELCOME 1

A proof is an HMAC-SHA256 of the offer and of both random numbers, with a label for each direction, so that a
proof which one end made is of no use to the other. Without a cluster token the proofs are made with an empty
key, and the offer alone tells the engine from a stranger.
"""

import hmac
import os
import secrets
import socket
import struct
from collections.abc import Callable
from time import monotonic

from farshore.cluster_token import PROOF_BYTES, ClusterToken, proof
from farshore.errors import Unauthenticated

OFFER_BYTES = 16
WELCOME = b"\1"
"""The shard's last byte: it serves the connection."""

_RANDOM_BYTES = 32
_SHARD, _ENGINE = b"farshore frames, shard", b"farshore frames, engine"
_PEER_CREDENTIALS = struct.Struct("3i")  # process, user, group


def prove_as_engine(
    connection: socket.socket, offer: bytes, token: ClusterToken | None, *, deadline_s: float
) -> None:
    """The engine's end. Raises Unauthenticated if the shard has another token, and OSError if it refuses or
    does not answer within ``deadline_s``."""
    until_s = monotonic() + deadline_s
    _check_user(connection)
    ours = secrets.token_bytes(_RANDOM_BYTES)
    _send(connection, offer + ours, until_s)
    answer = _receive(
        connection, _RANDOM_BYTES + PROOF_BYTES, until_s, "the shard did not take its own offer"
    )
    message = offer + ours + answer[:_RANDOM_BYTES]
    if not hmac.compare_digest(answer[_RANDOM_BYTES:], _proof(token, _SHARD, message)):
        raise Unauthenticated(
            "the process at the shard's address does not prove this cluster's token: copy one token file to "
            "every node"
        )
    _send(connection, _proof(token, _ENGINE, message), until_s)
    if _receive(connection, 1, until_s, "the shard did not take the cluster token") != WELCOME:
        raise ConnectionError("garbage: a byte that is no welcome")


def check_as_shard(
    connection: socket.socket,
    token: ClusterToken | None,
    *,
    offered: Callable[[bytes], bool],
    deadline_s: float,
) -> bytes:
    """The shard's end, up to its welcome, which the caller sends. Returns the offer that the engine presents.
    ``offered``: whether an offer is open. Raises OSError for a stranger, or after ``deadline_s`` in all."""
    until_s = monotonic() + deadline_s
    opening = _receive(connection, OFFER_BYTES + _RANDOM_BYTES, until_s, "nothing was sent")
    offer = opening[:OFFER_BYTES]
    if not offered(offer):
        raise ConnectionError("a connection without an offer of this shard")
    ours = secrets.token_bytes(_RANDOM_BYTES)
    message = opening + ours
    _send(connection, ours + _proof(token, _SHARD, message), until_s)
    answer = _receive(connection, PROOF_BYTES, until_s, "the engine did not take this shard's proof")
    if not hmac.compare_digest(answer, _proof(token, _ENGINE, message)):
        raise ConnectionError("an engine with another cluster token: copy one token file to every node")
    return offer


def is_own_user(connection: socket.socket) -> bool:
    """Whether the other end of a Unix socket is a process of this user. True for another kind of socket."""
    if connection.family != socket.AF_UNIX:
        return True
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    return _PEER_CREDENTIALS.unpack(credentials)[1] == os.geteuid()


def _check_user(connection: socket.socket) -> None:
    if not is_own_user(connection):
        raise Unauthenticated("a process of another user listens at the shard's Unix socket")


def _proof(token: ClusterToken | None, label: bytes, message: bytes) -> bytes:
    return proof(b"", label, message) if token is None else token.proof(label, message)


def _send(connection: socket.socket, data: bytes, until_s: float) -> None:
    connection.settimeout(max(1e-3, until_s - monotonic()))
    connection.sendall(data)


def _receive(connection: socket.socket, count: int, until_s: float, closed: str) -> bytes:
    """Receives ``count`` bytes. ``closed``: the reason to report if the other end hangs up."""
    data = b""
    while len(data) < count:
        left_s = until_s - monotonic()
        if left_s <= 0:
            raise TimeoutError("the handshake took too long")
        connection.settimeout(left_s)
        received = connection.recv(count - len(data))
        if not received:
            raise ConnectionError(closed)
        data += received
    return data
