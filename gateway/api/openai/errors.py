"""Errors in the shape of OpenAI's API, and the HTTP statuses that go with them.

Used by every handler of this room, so that each error has one status. Must not know what was asked.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import grpc
from starlette.responses import JSONResponse

from farshore import rpc
from farshore.errors import AlreadyExists, FarshoreError, Full, InvalidRequest, ModelError
from farshore.gateway.limits import ERROR_MESSAGE_CHARS
from farshore.gateway.requests.request import RequestFailed
from farshore.text import shortened

_INDEX = re.compile(r"\[(\d+)\]")
_SAME: Mapping[str, str | None] = {}


class ApiError(Exception):
    """Ends a call with this error. ``param``: the field of the body that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_ms = retry_after_ms

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {
            "error": {
                "message": shortened(str(self), ERROR_MESSAGE_CHARS),
                "type": _TYPES.get(
                    self.status, "invalid_request_error" if self.status < 500 else "server_error"
                ),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        headers: Mapping[str, str] = {}
        if self.retry_after_ms is not None:
            headers = {"Retry-After": str(max(1, -(-self.retry_after_ms // 1000)))}
        return JSONResponse(self.body(), self.status, headers)


_TYPES = {
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
    503: "server_unavailable",
    504: "timeout",
}


class _Http(NamedTuple):
    status: int
    code: str | None = None


_STATUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: _Http(400),
    grpc.StatusCode.NOT_FOUND: _Http(404),
    grpc.StatusCode.RESOURCE_EXHAUSTED: _Http(429, "overloaded"),
    grpc.StatusCode.FAILED_PRECONDITION: _Http(500),
    grpc.StatusCode.ABORTED: _Http(503),
    grpc.StatusCode.DATA_LOSS: _Http(500),
    grpc.StatusCode.CANCELLED: _Http(499, "cancelled"),
    grpc.StatusCode.DEADLINE_EXCEEDED: _Http(504),
    grpc.StatusCode.UNAVAILABLE: _Http(503),
}


def error_of(error: Exception, *, retry_after_ms: int, names: Mapping[str, str | None] = _SAME) -> ApiError:
    """The error to answer with. An exception that is no FarshoreError is a bug: 500, without its text.
    ``names``: see :func:`translate.names_of`."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ModelError):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, RequestFailed):
        if dict(error.failure.trailing).get(rpc.FREE_BYTES):
            return _full(error.failure.message)
        failure = error.failure
        return _of_status(failure.code, failure.message, retry_after_ms, param=_param(failure.field, names))
    if isinstance(error, AlreadyExists):
        return ApiError(409, str(error), param=_param(error.field, names), code="already_exists")
    if isinstance(error, InvalidRequest):
        return ApiError(400, str(error), param=_param(error.field, names))
    if isinstance(error, Full):
        return _full(str(error))
    if isinstance(error, FarshoreError):
        code, message, _ = rpc.status_of(error)
        return _of_status(code, message, retry_after_ms)
    return ApiError(500, "the gateway failed; see its log")


def _full(message: str) -> ApiError:
    """The request does not fit into the empty pool: it would be refused again."""
    return ApiError(400, message, code="context_length_exceeded")


def _param(field: str | None, names: Mapping[str, str | None]) -> str | None:
    """The body's name of a GenerateRequest's field."""
    if not field or field in names:
        return names.get(field or "")
    return _INDEX.sub(r".\1", field.removeprefix("sampling.").removeprefix("chat."))


def _of_status(
    code: grpc.StatusCode, message: str, retry_after_ms: int, *, param: str | None = None
) -> ApiError:
    http = _STATUSES.get(code, _Http(500))
    retryable = http.status in (429, 503)
    return ApiError(
        http.status,
        message,
        param=param,
        code=http.code,
        retry_after_ms=retry_after_ms if retryable else None,
    )
