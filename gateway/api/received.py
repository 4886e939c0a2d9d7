"""A Generate call as bytes: counted before it is parsed.

Called by ``service`` on the event loop. Parsing keeps the interpreter's lock for as long as it takes, and
some bytes take long (an empty chat message has two bytes and costs a hundred nanoseconds): what is certain to
be refused is refused from its outline, in time that the limits bound. Must not know what the fields mean.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

from google.protobuf.message import DecodeError

from farshore.errors import InvalidRequest
from farshore.gateway.limits import Limits
from farshore.proto import inference_pb2 as api

_FIELDS = api.GenerateRequest.DESCRIPTOR.fields_by_name
_CHAT, _TEXT, _TOKENS = (_FIELDS[name].number for name in ("chat", "text", "tokens"))
_SAMPLING, _SALT = (_FIELDS[name].number for name in ("sampling", "cache_salt"))

_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5  # wire types
_FIELDS_OF_A_MESSAGE = 4
_OTHER_FIELDS = 64
_CONTINUED = bytes(range(128, 256))


class Received(NamedTuple):
    """``fingerprint``: equal for requests that ask for the same thing: same prompt as sent, same sampling."""

    request: api.GenerateRequest
    fingerprint: bytes
    size_bytes: int


class _Field(NamedTuple):
    number: int
    wire_type: int
    start: int
    end: int


def parse(raw: bytes, *, max_positions: int, limits: Limits) -> Received:
    """Raises InvalidRequest for bytes that are no request, and for what has more parts than its limit."""
    fields = _Outline(raw, limits.messages * _FIELDS_OF_A_MESSAGE + _OTHER_FIELDS, limits)
    digest = hashlib.sha256()
    for field in fields.walk(0, len(raw)):
        if field.wire_type != _BYTES:
            continue
        if field.number == _CHAT:
            fields.check_chat(field)
        elif field.number == _TOKENS:
            fields.check_tokens(field, max_positions)
        elif field.number == _SAMPLING and field.end - field.start > limits.sampling_bytes:
            raise InvalidRequest(
                f"sampling takes {field.end - field.start} bytes: use at most {limits.sampling_bytes}"
            )
        if field.number in (_CHAT, _TEXT, _TOKENS, _SALT):
            digest.update(f"{field.number} {field.end - field.start} ".encode())
            digest.update(memoryview(raw)[field.start : field.end])
    try:
        request = api.GenerateRequest.FromString(raw)
    except DecodeError as error:
        raise _malformed() from error
    # A map has no order of its own: what was sent in another one is the same sampling.
    digest.update(request.sampling.SerializeToString(deterministic=True))
    return Received(request, digest.digest(), len(raw))


class _Outline:
    """The fields of one call, down to those of chat messages. At most ``most`` of them are looked at."""

    def __init__(self, raw: bytes, most: int, limits: Limits) -> None:
        self._raw = raw
        self._left = most
        self._limits = limits

    def walk(self, at: int, end: int) -> Iterator[_Field]:
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise InvalidRequest(
                    f"the request has too many fields: use at most {self._limits.messages} messages, "
                    "each with one role and one content, and token ids packed"
                )
            tag, at = self._varint(at, end)
            wire_type = tag & 7
            if wire_type == _BYTES:
                size, at = self._varint(at, end)
                last = at + size
            elif wire_type == _VARINT:
                _, last = self._varint(at, end)
            elif wire_type in (_FIXED_32, _FIXED_64):
                last = at + (4 if wire_type == _FIXED_32 else 8)
            else:
                raise _malformed()
            if last > end:
                raise _malformed()
            yield _Field(tag >> 3, wire_type, at, last)
            at = last

    def check_chat(self, chat: _Field) -> None:
        for place, message in enumerate(self.walk(chat.start, chat.end)):
            if place >= self._limits.messages:
                raise InvalidRequest(
                    f"the chat has more than {self._limits.messages} messages: leave out the oldest, "
                    "or join some"
                )
            if message.wire_type == _BYTES:
                for _ in self.walk(message.start, message.end):
                    pass

    def check_tokens(self, tokens: _Field, max_positions: int) -> None:
        count = 0
        for ids in self.walk(tokens.start, tokens.end):
            if ids.wire_type != _BYTES:
                count += 1
                continue
            # Every id ends with the one byte of it that is below 128.
            count += len(self._raw[ids.start : ids.end].translate(None, _CONTINUED))
        if count >= max_positions:
            raise InvalidRequest(
                f"the prompt has {count} tokens and the model {max_positions} positions: "
                f"shorten the prompt to at most {max_positions - 1} tokens"
            )

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while at < end and shift < 70:
            byte = self._raw[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value, at
            shift += 7
        raise _malformed()


def _malformed() -> InvalidRequest:
    return InvalidRequest("the call's bytes are no GenerateRequest: use the client's own version of the API")
