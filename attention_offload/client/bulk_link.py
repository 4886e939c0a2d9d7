"""One store's way for bulk KV: a connection made when it is first needed, shared by the engine's threads.

Called by ``remote_store``, which falls back to gRPC where there is no such connection.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from farshore.attention_offload.transport.bulk import BulkConnection
from farshore.attention_offload.transport.connect import Dialler
from farshore.attention_offload.transport.frames import Transport
from farshore.errors import TransportError

GRPC_FOR_CALLS = 256
"""After a connection was tried in vain, so many transfers go over gRPC before it is tried again."""


class BulkLink:
    """Thread-safe: transfers take turns. ``deadline_s``: how long one may stand still, without any byte
    moving, how long another one waits for its turn, and of the call that asks the shard where it listens."""

    def __init__(self, dialler: Dialler, address: str, *, deadline_s: float) -> None:
        self._dialler = dialler
        self._address = address
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._stream: BulkConnection | None = None
        self._grpc_calls = 0
        self.transport: Transport | None = None
        """What carried the last transfer; None while there is no connection."""

    def run(self, transfer: Callable[[BulkConnection], None]) -> bool:
        """Whether it was done; False where gRPC has to. ``transfer`` may be run twice: the shard may have
        been away since the last one. Raises TransportError, or what the shard refuses it with."""
        with self._taken():
            used = self._stream is not None
            try:
                return self._once(transfer)
            except TransportError as error:
                if not used or isinstance(error.__cause__, TimeoutError):
                    raise
            return self._once(transfer)

    def close(self) -> None:
        """After the transfer under way, if there is one."""
        with self._taken():
            self._drop()

    @contextmanager
    def _taken(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=self._deadline_s):
            raise TransportError(
                f"{self._address}: bulk KV of another thread took over {self._deadline_s:g} s"
            )
        try:
            yield
        finally:
            self._lock.release()

    def _once(self, transfer: Callable[[BulkConnection], None]) -> bool:
        stream = self._stream or self._connect()
        if stream is None:
            return False
        try:
            transfer(stream)
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
        self._stream = BulkConnection(connected.connection, self._address, deadline_s=self._deadline_s)
        self.transport = connected.transport
        return self._stream

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = self.transport = None
