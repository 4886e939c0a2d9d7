"""Connections past gRPC, shard's end: who may connect, and the loop that answers hot frames.

Runs in an attention worker's process beside its gRPC server, which hands out tokens: whoever connects here
has asked over gRPC first. One thread serves one connection; while a step runs it is inside one native call.
"""

import atexit
import logging
import os
import secrets
import selectors
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from google.protobuf.message import DecodeError

from farshore.attention_offload import codec
from farshore.attention_offload.shard.session import ShardSession
from farshore.attention_offload.transport.connect import WELCOME, is_near, tune
from farshore.attention_offload.transport.frames import native
from farshore.errors import InvalidRequest, TransportError
from farshore.proto import attention_pb2 as pb

_LOG = logging.getLogger(__name__)

TOKEN_BYTES = 16
MAX_TOKENS = 256
"""Handed out and not used; the oldest is forgotten."""

MAX_CONNECTIONS = 64
HELLO_DEADLINE_S = 5.0
FRAME_DEADLINE_S = 30.0
"""For the rest of a frame that has begun, and for an engine to read an answer."""
NEAR_AWAKE_US, FAR_AWAKE_US = 20, 400
"""How long a shard waits for the next layer's frame awake, where frames come that soon. An engine on this
host may need this very core for what comes before that frame."""

Serve = Callable[[socket.socket, bool], None]
"""Serves a connection (a Unix one?) until it ends."""


class FrameListener:
    """Listens on an abstract Unix socket, which has no file, and on a TCP port of the host gRPC is at."""

    def __init__(self, host: str) -> None:
        self._unix = socket.socket(socket.AF_UNIX)
        self.unix_name = f"farshore-{os.getpid()}-{secrets.token_hex(8)}"
        self._unix.bind(f"\0{self.unix_name}")
        self._unix.listen()
        self._tcp = _listen(host)
        self.tcp_address: tuple[str, int] = self._tcp.getsockname()[:2]
        self._stop_here, self._stop_there = socket.socketpair()
        self._lock = threading.Lock()
        self._waiting: OrderedDict[bytes, Serve] = OrderedDict()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._acceptor = threading.Thread(target=self._accept, name="frames-acceptor", daemon=True)
        self._acceptor.start()
        # A thread inside a native call must not meet an interpreter that is gone.
        atexit.register(self.close)

    def expect(self, serve: Serve, *, tcp: bool, shares_cores: bool = False) -> pb.ConnectReply:
        """An offer: whoever brings its token is served, once. ``tcp``: or by the Unix socket alone."""
        token = secrets.token_bytes(TOKEN_BYTES)
        with self._lock:
            self._waiting[token] = serve
            while len(self._waiting) > MAX_TOKENS:
                self._waiting.popitem(last=False)
        return pb.ConnectReply(
            token=token,
            unix_name=self.unix_name,
            tcp_port=self.tcp_address[1] if tcp else 0,
            shares_cores=shares_cores,
        )

    def close(self) -> None:
        """End every connection, and listen no more. Idempotent."""
        atexit.unregister(self.close)
        self._stop_here.close()
        self._acceptor.join()
        with self._lock:
            connections = dict(self._connections)
        for connection, thread in connections.items():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join()

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector, self._unix, self._tcp, self._stop_there:
            for it in (self._unix, self._tcp, self._stop_there):
                selector.register(it, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._stop_there:
                        return
                    listener: Any = key.fileobj
                    with suppress(OSError):  # gone again before it was accepted
                        self._start(listener.accept()[0], listener is self._unix)

    def _start(self, connection: socket.socket, unix: bool) -> None:
        thread = threading.Thread(target=self._serve, args=(connection, unix), name="frames", daemon=True)
        with self._lock:
            if len(self._connections) >= MAX_CONNECTIONS:
                connection.close()
                return
            self._connections[connection] = thread
        thread.start()

    def _serve(self, connection: socket.socket, unix: bool) -> None:
        try:
            with connection:
                if not unix:
                    tune(connection)
                connection.settimeout(HELLO_DEADLINE_S)
                token = connection.recv(TOKEN_BYTES, socket.MSG_WAITALL)
                with self._lock:
                    serve = self._waiting.pop(token, None)
                if serve is None:
                    _LOG.warning("a connection without a token that we gave: closed")
                    return
                connection.sendall(WELCOME)
                serve(connection, unix)
        except OSError as error:
            _LOG.info("a connection ended: %s", error)
        finally:
            with self._lock:
                del self._connections[connection]


def _listen(host: str) -> socket.socket:
    """On any free port of ``host`` and of no other address; as gRPC, on IPv4 too where that is ``::``."""
    try:
        family, *_, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(where[:2], family=family, dualstack_ipv6=both)
    except OSError as error:
        raise InvalidRequest(
            f"cannot listen on {host!r} for TCP frames: {error}; give an address of this host"
        ) from error


def serve_frames(
    session: ShardSession, dtype: torch.dtype, shares_cores: bool, connection: socket.socket, unix: bool
) -> None:
    """Answer one engine's steps until it hangs up. What it asks wrongly ends it: it is told why.
    ``shares_cores``: with the engine, if it is on this host."""
    module = native()
    # The native end has a descriptor of its own; ours still serves to shut the connection down.
    if unix:
        wire = module.shared_memory(os.dup(connection.fileno()), FRAME_DEADLINE_S, NEAR_AWAKE_US)
    else:
        near = is_near(connection)
        shares_cores = shares_cores and near
        awake_us = NEAR_AWAKE_US if near else FAR_AWAKE_US
        wire = module.stream(os.dup(connection.fileno()), FRAME_DEADLINE_S, near, awake_us)
    try:
        asked = module.serve(wire, None, shares_cores)
        while asked is not None:
            if isinstance(asked, tuple):
                session.look_again(*asked)
            elif isinstance(asked, int):
                session.repeat_step(asked)
            else:
                session.begin(codec.step_from_pb(pb.Step.FromString(asked)))
            asked = module.serve(wire, session.native_step(dtype), shares_cores)
    except Exception as error:
        _LOG.info("a connection for hot frames ends: %s", error)
        with suppress(OSError):
            module.fail(wire, codec.failure_to_pb(_as_ours(error)).SerializeToString())


def _as_ours(error: Exception) -> Exception:
    if isinstance(error, OSError):
        return TransportError(str(error))
    if isinstance(error, ValueError | DecodeError):
        return InvalidRequest(str(error))
    return error
