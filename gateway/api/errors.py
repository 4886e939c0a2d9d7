"""Statuses of failed gRPC calls with their details, as google.rpc defines them.

Used by ``service``, ``batch`` and ``admin`` for every failed call. Clients find there what a message's words
may not say for ever: a reason, whether and when to try again, and the field that is wrong. Must not know what
was asked.
"""

import logging
import re

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from farshore import rpc
from farshore.errors import FarshoreError
from farshore.gateway.requests.request import Failure, RequestFailed

DOMAIN = "farshore"

_logger = logging.getLogger(__name__)
_RETRYABLE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}

Trailing = tuple[tuple[str, str | bytes], ...]


def failure_of(error: Exception) -> Failure:
    """How a call fails that raised ``error``. An exception of another kind than ours is a bug: it is logged,
    and its text is not told."""
    if isinstance(error, RequestFailed):
        return error.failure
    if isinstance(error, FarshoreError):
        return Failure.of(error)
    _logger.error("a call broke the gateway", exc_info=error)
    return Failure(grpc.StatusCode.INTERNAL, "the gateway failed; see its log")


def status_of(failure: Failure, *, retry_after_ms: int) -> Status:
    """The failure with its details, and a retry hint where another try may succeed. The reason of its
    ErrorInfo is the type of the error, such as OVERLOADED."""
    kind = dict(failure.trailing).get(rpc.ERROR_KIND, failure.code.name)
    details: list[Message] = [ErrorInfo(reason=_reason(kind), domain=DOMAIN)]
    if _is_retryable(failure):
        delay = Duration()
        delay.FromMilliseconds(retry_after_ms)
        details.append(RetryInfo(retry_delay=delay))
    if failure.field is not None:
        violation = BadRequest.FieldViolation(field=failure.field, description=failure.message)
        details.append(BadRequest(field_violations=[violation]))
    status = Status(code=failure.code.value[0], message=failure.message)
    for detail in details:
        status.details.add().Pack(detail)
    return status


def trailing_of(failure: Failure, *, retry_after_ms: int) -> Trailing:
    """The trailing metadata of a call that ends with ``failure``: its own, a retry hint and the details."""
    status = status_of(failure, retry_after_ms=retry_after_ms)
    hint: Trailing = ((rpc.RETRY_PUSHBACK, str(retry_after_ms)),) if _is_retryable(failure) else ()
    return (*failure.trailing, *hint, (rpc.STATUS_DETAILS, status.SerializeToString()))


def _is_retryable(failure: Failure) -> bool:
    # A request that no pool of this size can hold fails again.
    return failure.code in _RETRYABLE and rpc.FREE_BYTES not in dict(failure.trailing)


def _reason(kind: str) -> str:
    """OVERLOADED for Overloaded, MODEL_ERROR for ModelError."""
    return kind if kind.isupper() else re.sub(r"(?<!^)(?=[A-Z])", "_", kind).upper()
