"""Statuses of failed gRPC calls with their details, as google.rpc defines them.

Used by ``service`` for every failed call. Clients find there what a message's words may not say for ever: a
reason, whether and when to try again, and the field that is wrong. Must not know what was asked.
"""

import re

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from farshore import rpc
from farshore.errors import FarshoreError, InvalidRequest

DETAILS = "grpc-status-details-bin"
"""Trailing metadata with the serialised Status."""

DOMAIN = "farshore"
RETRY_PUSHBACK = "grpc-retry-pushback-ms"
"""Trailing metadata: gRPC clients with a retry policy wait this long."""

_RETRYABLE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}

Trailing = tuple[tuple[str, str | bytes], ...]


def trailing_of(
    code: grpc.StatusCode,
    message: str,
    trailing: tuple[tuple[str, str], ...],
    *,
    retry_after_ms: int,
    field: str | None = None,
) -> Trailing:
    """``trailing`` with the call's details, and a retry hint where another try may succeed. The reason of its
    ErrorInfo is the type of the error, such as OVERLOADED."""
    given = dict(trailing)
    kind = given.get(rpc.ERROR_KIND, code.name)
    details = [ErrorInfo(reason=_reason(kind), domain=DOMAIN)]
    # A request that no pool of this size can hold fails again.
    retryable = code in _RETRYABLE and rpc.FREE_BYTES not in given
    if retryable:
        delay = Duration()
        delay.FromMilliseconds(retry_after_ms)
        details.append(RetryInfo(retry_delay=delay))
    if field is not None:
        details.append(
            BadRequest(field_violations=[BadRequest.FieldViolation(field=field, description=message)])
        )
    status = Status(code=code.value[0], message=message)
    for detail in details:
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
    hint: Trailing = ((RETRY_PUSHBACK, str(retry_after_ms)),) if retryable else ()
    return (*trailing, *hint, (DETAILS, status.SerializeToString()))


def field_of(error: FarshoreError) -> str | None:
    """The request's field that an error is about; None if it is about none."""
    return error.field if isinstance(error, InvalidRequest) else None


def _reason(kind: str) -> str:
    """OVERLOADED for Overloaded, MODEL_ERROR for ModelError."""
    return kind if kind.isupper() else re.sub(r"(?<!^)(?=[A-Z])", "_", kind).upper()
