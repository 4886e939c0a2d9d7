"""The errors that Farshore raises on purpose; raised and caught by every floor.

::

    FarshoreError
    ├── InvalidRequest          the caller's input is wrong; the message names the fix
    │   ├── ModelError          a model that is unknown, unsupported or damaged
    │   ├── AlreadyExists       a name that something else has: choose another one
    │   ├── ResumeMismatch      an answer has other tokens than those that were received
    │   └── PortInUse           a listening address is taken
    ├── NotFound                an unknown span, sequence or request
    ├── Full                    memory was asked for and refused
    ├── Overloaded              a queue is full: try again later        (retryable)
    ├── Corrupt                 bytes are not what was sent or sealed: fetch them again   (retryable)
    ├── Fenced                  an older epoch tried to write: stop, another engine owns the sequence
    ├── InvalidPlan             a step plan with a hole or an overlap
    ├── Cancelled               the caller, or another client, cancelled the call
    ├── DeadlineExceeded        a wait reached its deadline
    ├── TransportError          no connection, or a broken one   (retryable: reads lose nothing)
    │   ├── Late                shards that missed a frame's deadline: go on without them, retry later
    │   ├── Lost                shards that are gone: connection refused, restarted, or silent for too long
    │   └── Unauthenticated     processes that do not share the cluster token, or whose clocks differ
    ├── Internal                a bug in this process or in the one it called: the same call fails again
    ├── StartupError            the cluster could not be started
    └── ProcessEnded            a process or engine that a running cluster needs has ended

gRPC, Ray and Redis errors are translated into these once, where they enter, with the cause chained.
"""

from collections.abc import Iterable


class FarshoreError(Exception):
    """Base of the tree. ``retryable``: the same call may succeed if it is repeated unchanged."""

    retryable = False


class InvalidRequest(FarshoreError):
    """``field``: the path of the request's field that is wrong, such as ``sampling.top_p``; None if there is
    no single one."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ModelError(InvalidRequest):
    pass


class AlreadyExists(InvalidRequest):
    pass


class ResumeMismatch(InvalidRequest):
    pass


class PortInUse(InvalidRequest):
    pass


class NotFound(FarshoreError):
    pass


class Full(FarshoreError):
    """A store refused memory. The refusal is final: the request is not forwarded to another store.

    ``free_bytes``: the bytes that the store could still grant.
    """

    def __init__(self, message: str, *, free_bytes: int) -> None:
        super().__init__(message)
        self.free_bytes = free_bytes


class Overloaded(FarshoreError):
    retryable = True


class Corrupt(FarshoreError):
    retryable = True


class Fenced(FarshoreError):
    pass


class InvalidPlan(FarshoreError):
    pass


class Cancelled(FarshoreError):
    pass


class DeadlineExceeded(FarshoreError):
    pass


class TransportError(FarshoreError):
    retryable = True


class _ShardsError(TransportError):
    """``shards``: worker ids of the attention workers that the error is about."""

    def __init__(self, message: str, *, shards: Iterable[str]) -> None:
        super().__init__(message)
        self.shards = frozenset(shards)


class Late(_ShardsError):
    pass


class Lost(_ShardsError):
    pass


class Unauthenticated(TransportError):
    pass


class Internal(FarshoreError):
    pass


class StartupError(FarshoreError):
    pass


class ProcessEnded(FarshoreError):
    pass
