"""Parses the bodies of calls, in time that is bounded: it runs on the event loop, where every stream waits.

Called by ``endpoints``. It refuses what ``schema`` does not describe, and fields that the API does not
support, by name. Must not know what the fields mean.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from farshore.gateway.api.openai.errors import ApiError
from farshore.text import shortened

_Body = TypeVar("_Body", bound=BaseModel)

MOST_CONTAINERS = 1 << 16
"""JSON objects and arrays of one body. Parsing and checking takes some microseconds for each."""

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)


def parsed(kind: type[_Body], raw: bytes) -> _Body:
    """The body. Raises ApiError, with the field's path, for what is no such body, and for fields that are not
    supported. Runs on the event loop: its time is bounded, see ``schema``."""
    if _containers(raw) > MOST_CONTAINERS:
        raise ApiError(400, f"the body has more than {MOST_CONTAINERS} objects and arrays: send fewer")
    try:
        body = kind.model_validate_json(raw)
    except ValidationError as error:
        # `url`, `input` and `ctx` may repeat the whole body.
        errors = error.errors(include_url=False, include_input=False, include_context=False)
        first = max(errors, key=_reach)
        param = ".".join(str(part) for part in first["loc"] if not _names_a_type(part))
        message = f"{param}: {first['msg']}" if param else f"the body is not usable: {first['msg']}"
        raise ApiError(400, shortened(message), param=param or None) from None
    for path, value in _extras(body, ""):
        if value is not None:
            raise ApiError(
                400,
                f"{shortened(path)} is not supported: leave it out",
                param=shortened(path),
                code="unsupported",
            )
    return body


def _containers(raw: bytes) -> int:
    """JSON objects and arrays of ``raw``; a larger number, with those in strings, if that is small enough."""
    most = raw.count(b"{") + raw.count(b"[")
    if most <= MOST_CONTAINERS:
        return most
    bare = _STRING.sub(b"", raw)
    return bare.count(b"{") + bare.count(b"[")


def _reach(error: Mapping[str, Any]) -> tuple[list[int], bool]:
    """The order of a union's errors: that of the kind which fits furthest is told."""
    indices = [part for part in error["loc"] if isinstance(part, int)]
    return (indices if any(indices) else [], error["type"] == "too_long")


def _extras(body: BaseModel, path: str) -> Iterator[tuple[str, Any]]:
    """Every field that the models do not name, with its path."""
    for name, value in (body.model_extra or {}).items():
        yield f"{path}{name}", value
    for name in type(body).model_fields:
        value = getattr(body, name)
        values = enumerate(value) if isinstance(value, list) else [("", value)]
        for index, one in values:
            if isinstance(one, BaseModel):
                yield from _extras(
                    one, f"{path}{name}.{index}." if isinstance(value, list) else f"{path}{name}."
                )


def _names_a_type(part: str | int) -> bool:
    """Whether a part of pydantic's location names an alternative of a union rather than a field."""
    return isinstance(part, str) and (part[:1].isupper() or "[" in part or part in _TYPE_NAMES)


_TYPE_NAMES = {"str", "int", "float", "bool", "constrained-str", "constrained-int", "literal"}
