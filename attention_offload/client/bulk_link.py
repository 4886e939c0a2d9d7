"""Keeps one native connection for bulk KV to a shard, made on first use and shared by the engine's threads.

Called by ``remote_store``, which transfers over gRPC if there is no such connection. It must not know spans.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from farshore.attention_offload.transport.bulk import BulkConnection
from farshore.attention_offload.transport.connect import Dialler
from farshore.attention_offload.transport.frames import Transport
from farshore.errors import TransportError

GRPC_FOR_CALLS = 256
"""The number of transfers that go over gRPC after a connection failed, before the next try to connect."""


class BulkLink:
    """The connection for bulk KV to one shard. Thread-safe; it carries one transfer at a time."""

    def __init__(self, dialler: Dialler, address: str, *, deadline_s: float) -> None:
        """``deadline_s`` bounds the time in which no byte of a transfer moves, the wait of a transfer for
        another one to end, and the call that asks the shard where it listens."""
        self._dialler = dialler
        self._address = address
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._connection: BulkConnection | None = None
        self._grpc_calls = 0
        self.transport: Transport | None = None
        """The transport of the last transfer. None while there is no connection."""

    def run(self, transfer: Callable[[BulkConnection], None]) -> bool:
        """Runs ``transfer`` on the connection. Returns False, without running it, if there is no connection
        and the caller must use gRPC.

        Runs ``transfer`` a second time, on a new connection, if an existing connection breaks: the shard may
        have restarted since the last transfer. Raises TransportError, or the error with which the shard
        refuses the transfer."""
        with self._locked():
            reused = self._connection is not None
            try:
                return self._run_once(transfer)
            except TransportError as error:
                if not reused or isinstance(error.__cause__, TimeoutError):
                    raise
            return self._run_once(transfer)

    def close(self) -> None:
        """Closes the connection once the current transfer, if any, has ended."""
        with self._locked():
            self._drop()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=self._deadline_s):
            raise TransportError(
                f"{self._address}: bulk KV of another thread took more than {self._deadline_s:g} s"
            )
        try:
            yield
        finally:
            self._lock.release()

    def _run_once(self, transfer: Callable[[BulkConnection], None]) -> bool:
        connection = self._connection or self._connect()
        if connection is None:
            return False
        try:
            transfer(connection)
        except TransportError:
            self._drop()
            raise
        return True

    def _connect(self) -> BulkConnection | None:
        if self._grpc_calls:
            self._grpc_calls -= 1
            return None
        connected = self._dialler.connect(None, deadline_s=self._deadline_s)
        if connected is None:
            self._grpc_calls = GRPC_FOR_CALLS
            self.transport = Transport.GRPC
            return None
        self._connection = BulkConnection(connected.connection, self._address, deadline_s=self._deadline_s)
        self.transport = connected.transport
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = self.transport = None
