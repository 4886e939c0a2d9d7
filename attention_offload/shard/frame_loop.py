"""Accepts native connections at the shard, and serves those that carry hot frames.

Called by ``shard.server``, in an attention worker's process. A connection is served only if it presents an
offer that the gRPC service has made, and proves the cluster token. One thread serves one connection; while a
step runs, the thread is inside one native call. It must not know the store.
"""

import atexit
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from google.protobuf.message import DecodeError

from farshore.attention_offload import codec
from farshore.attention_offload.shard.session import ShardSession
from farshore.attention_offload.transport.connect import is_same_host, tune
from farshore.attention_offload.transport.frames import native
from farshore.attention_offload.transport.handshake import (
    OFFER_BYTES,
    WELCOME,
    check_as_shard,
    is_own_user,
)
from farshore.cluster_token import ClusterToken
from farshore.errors import InvalidRequest, TransportError
from farshore.kernels.host import address
from farshore.proto import attention_pb2 as pb

_LOG = logging.getLogger(__name__)

MAX_OFFERS = 256
"""The most unused offers; beyond that the oldest offer becomes invalid."""

MAX_CONNECTIONS = 512
"""Connections of engines that are served at once, a thread each. An engine has three: two for hot frames, one
for bulk KV."""

MAX_UNPROVEN = 64
"""Connections in their handshake. A further one takes the place of the oldest, so that strangers who connect
and send nothing keep no engine out. A handshake takes about a millisecond."""

BACKLOG = 1024
"""Connections that wait to be accepted. A further one to a Unix socket is refused at once."""

HANDSHAKE_DEADLINE_S = 5.0
ACCEPT_RETRY_S = 0.1
"""After an error of the system, such as too many open files, for which the listener stays readable."""

FRAME_DEADLINE_S = 30.0
"""The deadline for the rest of a frame that has begun to arrive, and for sending an answer."""

SAME_HOST_SPIN_US, REMOTE_SPIN_US = 20, 400
"""How long a shard spins for the next layer's frame before it sleeps, if frames usually arrive that soon. An
engine on the same host may need the core on which the shard spins to compute that frame."""

Serve = Callable[[socket.socket, bool], None]
"""Serves a connection until it ends; the flag tells whether its socket is a Unix socket."""


class FrameListener:
    """Listens on an abstract Unix socket, which has no file, and on a free TCP port of gRPC's host.

    Thread-safe. It serves connections in daemon threads until :meth:`close`. ``token``: what an engine must
    prove; None: an offer is enough.
    """

    def __init__(self, host: str, *, token: ClusterToken | None) -> None:
        self._token = token
        self._unix = socket.socket(socket.AF_UNIX)
        self.unix_name = f"farshore-{os.getpid()}-{secrets.token_hex(8)}"
        self._unix.bind(f"\0{self.unix_name}")
        self._unix.listen(BACKLOG)
        self._tcp = _listen(host)
        self.tcp_address: tuple[str, int] = self._tcp.getsockname()[:2]
        self._stop_sender, self._stop_receiver = socket.socketpair()
        self._lock = threading.Lock()
        self._offers: OrderedDict[bytes, Serve] = OrderedDict()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._unproven: OrderedDict[socket.socket, None] = OrderedDict()
        """Those of ``_connections`` that are in their handshake, oldest first."""
        self._acceptor = threading.Thread(target=self._accept, name="frames-acceptor", daemon=True)
        self._acceptor.start()
        # A thread in a native call must not return to an interpreter that has been finalised.
        atexit.register(self.close)

    def expect(self, serve: Serve, *, tcp: bool, shares_cores: bool = False) -> pb.ConnectReply:
        """Makes an offer and returns it with the listener's addresses.

        The next connection that presents the offer is passed to ``serve``; an offer is valid once. Without
        ``tcp`` the reply names the Unix socket only. ``shares_cores`` is part of the reply."""
        offer = secrets.token_bytes(OFFER_BYTES)
        with self._lock:
            self._offers[offer] = serve
            while len(self._offers) > MAX_OFFERS:
                self._offers.popitem(last=False)
        return pb.ConnectReply(
            token=offer,
            unix_name=self.unix_name,
            tcp_port=self.tcp_address[1] if tcp else 0,
            shares_cores=shares_cores,
        )

    def close(self) -> None:
        """Stops listening, shuts every connection down, and waits for their threads. Idempotent."""
        atexit.unregister(self.close)
        self._stop_sender.close()
        self._acceptor.join()
        with self._lock:
            connections = dict(self._connections)
        for connection, thread in connections.items():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join()

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector, self._unix, self._tcp, self._stop_receiver:
            for watched in (self._unix, self._tcp, self._stop_receiver):
                selector.register(watched, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._stop_receiver:
                        return
                    listener: Any = key.fileobj
                    try:
                        self._start(listener.accept()[0], listener is self._unix)
                    except ConnectionError:
                        continue  # The engine closed the connection before it was accepted.
                    except (OSError, RuntimeError) as error:  # No descriptor or no thread is left.
                        _LOG.warning("can't accept a connection: %s", error)
                        time.sleep(ACCEPT_RETRY_S)

    def _start(self, connection: socket.socket, unix: bool) -> None:
        if not is_own_user(connection):
            connection.close()
            return
        thread = threading.Thread(target=self._serve, args=(connection, unix), name="frames", daemon=True)
        with self._lock:
            if len(self._unproven) >= MAX_UNPROVEN:
                oldest, _ = self._unproven.popitem(last=False)
                with suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
            # More only while threads that were shut down have not run yet.
            if len(self._connections) >= MAX_CONNECTIONS + 2 * MAX_UNPROVEN:
                connection.close()
                return
            self._connections[connection] = thread
            self._unproven[connection] = None
        try:
            thread.start()
        except RuntimeError:
            self._forget(connection)
            connection.close()
            raise

    def _serve(self, connection: socket.socket, unix: bool) -> None:
        try:
            with connection:
                if not unix:
                    tune(connection)
                serve = self._admit(connection)
                connection.settimeout(HANDSHAKE_DEADLINE_S)
                connection.sendall(WELCOME)
                serve(connection, unix)
        except OSError as error:
            _LOG.info("a connection ended: %s", error)
        finally:
            self._forget(connection)

    def _forget(self, connection: socket.socket) -> None:
        with self._lock:
            del self._connections[connection]
            self._unproven.pop(connection, None)

    def _admit(self, connection: socket.socket) -> Serve:
        """Makes the handshake and takes the offer. Raises OSError for a connection that is not served."""
        offer = check_as_shard(
            connection, self._token, offered=self._offers.__contains__, deadline_s=HANDSHAKE_DEADLINE_S
        )
        with self._lock:
            serve = self._offers.pop(offer, None)
            proven = len(self._connections) - len(self._unproven)
            if serve is None or proven >= MAX_CONNECTIONS:
                raise ConnectionError("an offer that was used meanwhile, or too many connections")
            self._unproven.pop(connection, None)
        return serve


def _listen(host: str) -> socket.socket:
    """Listens on a free port of ``host`` only. Like gRPC, "::" includes IPv4. Raises InvalidRequest."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address[:2], family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise InvalidRequest(
            f"cannot listen on {host!r} for TCP frames: {error}; give an address of this host"
        ) from error


def serve_frames(
    session: ShardSession, dtype: torch.dtype, shares_cores: bool, connection: socket.socket, unix: bool
) -> None:
    """Answers one engine's steps until the engine hangs up.

    An error in a step ends the connection: it is logged, and sent to the engine in a FAILURE frame.
    ``shares_cores`` tells whether engine and shard share cores if both are on this host; it is ignored for an
    engine on another host."""
    module = native()
    # The native code gets a duplicate descriptor, so that the listener can still shut the connection down.
    if unix:
        wire = module.shared_memory(os.dup(connection.fileno()), FRAME_DEADLINE_S, SAME_HOST_SPIN_US)
    else:
        same_host = is_same_host(connection)
        shares_cores = shares_cores and same_host
        spin_us = SAME_HOST_SPIN_US if same_host else REMOTE_SPIN_US
        wire = module.stream(os.dup(connection.fileno()), FRAME_DEADLINE_S, same_host, spin_us)
    try:
        # serve() returns when it needs Python: for a new step (bytes), for the number of a repeated step, for
        # a recheck of the current step's spans (step,), for the answer to a frame on a device (step, layer,
        # micro-batch), or because the engine has hung up (None).
        event = module.serve(wire, None, shares_cores)
        while event is not None:
            if isinstance(event, tuple) and len(event) == 3:
                q = session.queries(*event, dtype)
                module.question(wire, address(q), q.nbytes)
                o, lse = session.attend_staged(*event)
                module.answer(wire, address(lse), lse.nbytes, address(o), o.nbytes)
            elif isinstance(event, tuple):
                session.recheck_spans(*event)
            elif isinstance(event, int):
                session.repeat_step(event)
            else:
                session.begin(codec.step_from_pb(pb.Step.FromString(event)))
            event = module.serve(wire, session.native_step(dtype), shares_cores)
    except Exception as error:
        _LOG.info("a connection for hot frames ends: %s", error)
        with suppress(OSError):
            module.fail(wire, codec.failure_to_pb(_as_farshore_error(error)).SerializeToString())


def _as_farshore_error(error: Exception) -> Exception:
    if isinstance(error, OSError):
        return TransportError(str(error))
    if isinstance(error, ValueError | DecodeError):
        return InvalidRequest(str(error))
    return error
