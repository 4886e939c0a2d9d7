"""Every error Farshore raises on purpose.

::

    FarshoreError
    ├── InvalidRequest          the caller's input is wrong; the message names the fix
    │   ├── ModelError          a model that is unknown, unsupported or damaged
    │   └── PortInUse           a listening address is taken
    ├── NotFound                an unknown span, sequence or request
    ├── Full                    memory was asked for and refused
    ├── Overloaded              a queue is full: try again later        (retryable)
    ├── Corrupt                 bytes are not what was sent or sealed: fetch them again   (retryable)
    ├── Fenced                  an older epoch tried to write: stop, somebody else owns the sequence
    ├── InvalidPlan             a step plan with a hole or an overlap
    ├── Cancelled               the caller went away
    ├── DeadlineExceeded        a wait ran out
    ├── TransportError          a peer could not be reached or broke off (retryable: reads lose nothing)
    │   ├── Late                shards that missed a frame's deadline: set them aside, ask again
    │   └── Lost                shards that are gone: connection refused, restarted, or silent for too long
    ├── Internal                a mistake in Farshore or in a peer: the same call fails again
    ├── StartupError            the cluster could not be started
    └── PartEnded               a part of a running cluster ended, and nothing replaces it

gRPC, Ray and Redis errors become these once, at the edge, with the cause chained.
"""

from collections.abc import Iterable


class FarshoreError(Exception):
    """Base of the tree. ``retryable``: the same call may succeed later, unchanged."""

    retryable = False


class InvalidRequest(FarshoreError):
    pass


class ModelError(InvalidRequest):
    pass


class PortInUse(InvalidRequest):
    pass


class NotFound(FarshoreError):
    pass


class Full(FarshoreError):
    """A store refused memory. Refused is refused: nobody forwards the request.

    ``free_bytes`` is what the store still had.
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
    """``shards``: ids of the attention workers that the error is about."""

    def __init__(self, message: str, *, shards: Iterable[str]) -> None:
        super().__init__(message)
        self.shards = frozenset(shards)


class Late(_ShardsError):
    pass


class Lost(_ShardsError):
    pass


class Internal(FarshoreError):
    pass


class StartupError(FarshoreError):
    pass


class PartEnded(FarshoreError):
    pass
