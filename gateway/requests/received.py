"""Checks the size of a Generate or BatchGenerate call's bytes before they are parsed.

Called by ``intake`` and by ``api.batch`` on the event loop. Protobuf holds the interpreter's lock while it
parses, and some messages are slow to parse for their size (an empty chat message takes two bytes and a
hundred nanoseconds).
Requests that exceed a limit are therefore refused from the wire format, in time that the limits bound. Must
not know what the fields mean.
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
_SAMPLING, _SALT, _RESUME = (_FIELDS[name].number for name in ("sampling", "cache_salt", "resume"))
_RECEIVED = api.Resume.DESCRIPTOR.fields_by_name["received"].number
_MESSAGES = api.Chat.DESCRIPTOR.fields_by_name["messages"].number
_BATCHED = api.BatchGenerateRequest.DESCRIPTOR.fields_by_name["requests"].number
_TOOL_CALLS = api.Message.DESCRIPTOR.fields_by_name["tool_calls"].number

_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5  # wire types
_FIELDS_OF_A_MESSAGE = 4
_OTHER_FIELDS = 64
_CONTINUED = bytes(range(128, 256))


class Received(NamedTuple):
    """A parsed call. ``fingerprint``: SHA-256, equal for requests with the same prompt bytes, cache salt and
    sampling."""

    request: api.GenerateRequest
    fingerprint: bytes
    size_bytes: int


class _Field(NamedTuple):
    number: int
    wire_type: int
    start: int
    end: int


def parse(raw: bytes, *, max_positions: int, limits: Limits) -> Received:
    """Raises InvalidRequest if ``raw`` is not a GenerateRequest, or has more fields, messages, tokens or
    sampling bytes than its limit."""
    fields = _WireFields(raw, limits.messages * _FIELDS_OF_A_MESSAGE + _OTHER_FIELDS, limits)
    digest = hashlib.sha256()
    prompt_tokens, sampling = 0, []
    for field in fields.walk(0, len(raw)):
        if field.wire_type != _BYTES:
            continue
        if field.number == _CHAT:
            fields.check_chat(field)
        elif field.number == _TOKENS:
            prompt_tokens = max(prompt_tokens, fields.count_ids(field, "tokens"))
        elif field.number == _RESUME:
            fields.check_resume(field, max_positions)
        elif field.number == _SAMPLING:
            if (size := field.end - field.start) > limits.sampling_bytes:
                raise InvalidRequest(
                    f"sampling takes {size} bytes: use at most {limits.sampling_bytes}", field="sampling"
                )
            sampling.append(raw[field.start : field.end])
        if field.number in (_CHAT, _TEXT, _TOKENS, _SALT):
            digest.update(f"{field.number} {field.end - field.start} ".encode())
            digest.update(memoryview(raw)[field.start : field.end])
    try:
        if prompt_tokens >= max_positions and not _truncates(sampling):
            raise InvalidRequest(
                f"the prompt has {prompt_tokens} tokens and the model {max_positions} positions: "
                f"shorten the prompt to at most {max_positions - 1} tokens",
                field="tokens",
            )
        request = api.GenerateRequest.FromString(raw)
    except DecodeError as error:
        raise _malformed() from error
    # Deterministic: the order of a map's entries on the wire has no meaning.
    digest.update(request.sampling.SerializeToString(deterministic=True))
    return Received(request, digest.digest(), len(raw))


def split_batch(raw: bytes, limits: Limits) -> list[bytes]:
    """The serialised requests of a BatchGenerateRequest. Raises InvalidRequest."""
    requests = []
    for field in _WireFields(raw, limits.batch_requests + _OTHER_FIELDS, limits).walk(0, len(raw)):
        if field.number == _BATCHED and field.wire_type == _BYTES:
            requests.append(raw[field.start : field.end])
    if not 1 <= len(requests) <= limits.batch_requests:
        raise InvalidRequest(
            f"the batch has {len(requests)} requests: give 1 to {limits.batch_requests}", field="requests"
        )
    return requests


class _WireFields:
    """Walks the fields of one call and of its chat messages. Raises InvalidRequest after ``most`` fields."""

    def __init__(self, raw: bytes, most: int, limits: Limits) -> None:
        self._raw = raw
        self._left = most
        self._limits = limits

    def walk(self, start: int, end: int, path: str | None = None) -> Iterator[_Field]:
        """The fields between the byte offsets ``start`` and ``end``. ``path``: of what they are fields of."""
        offset = start
        while offset < end:
            self._left -= 1
            if self._left < 0:
                raise InvalidRequest(
                    f"the request has too many fields: use at most {self._limits.messages} messages, fewer "
                    "with many parts or tool calls, and token ids packed",
                    field=path,
                )
            tag, offset = self._varint(offset, end)
            wire_type = tag & 7
            if wire_type == _BYTES:
                size, offset = self._varint(offset, end)
                last = offset + size
            elif wire_type == _VARINT:
                _, last = self._varint(offset, end)
            elif wire_type in (_FIXED_32, _FIXED_64):
                last = offset + (4 if wire_type == _FIXED_32 else 8)
            else:
                raise _malformed()
            if last > end:
                raise _malformed()
            yield _Field(tag >> 3, wire_type, offset, last)
            offset = last

    def check_chat(self, chat: _Field) -> None:
        """Counts the messages of a chat and the fields of these and of their tool calls."""
        messages = 0
        for field in self.walk(chat.start, chat.end, "chat"):
            if field.number != _MESSAGES:
                continue
            messages += 1
            if messages > self._limits.messages:
                raise InvalidRequest(
                    f"the chat has more than {self._limits.messages} messages: leave out the oldest, "
                    "or join some",
                    field="chat.messages",
                )
            if field.wire_type == _BYTES:
                self._count_fields_of_message(field)

    def _count_fields_of_message(self, message: _Field) -> None:
        for field in self.walk(message.start, message.end, "chat.messages"):
            if field.number == _TOOL_CALLS and field.wire_type == _BYTES:
                for _ in self.walk(field.start, field.end, "chat.messages"):
                    pass

    def check_resume(self, resume: _Field, max_positions: int) -> None:
        """Counts the choices of what was received, and their tokens."""
        choices = 0
        for received in self.walk(resume.start, resume.end, "resume.received"):
            if received.number != _RECEIVED or received.wire_type != _BYTES:
                continue
            choices += 1
            if choices > self._limits.choices:
                raise InvalidRequest(
                    f"received has more than {self._limits.choices} choices, the most that a request has",
                    field="resume.received",
                )
            if (count := self.count_ids(received, "resume.received")) > max_positions:
                raise InvalidRequest(
                    f"a received choice has {count} tokens and the model {max_positions} positions",
                    field="resume.received",
                )

    def count_ids(self, tokens: _Field, path: str) -> int:
        """The number of ids of a TokenIds, in packed and unpacked form."""
        count = 0
        for ids in self.walk(tokens.start, tokens.end, path):
            if ids.wire_type != _BYTES:
                count += 1
                continue
            # In a packed list of varints, each id ends with its only byte below 128.
            count += len(self._raw[ids.start : ids.end].translate(None, _CONTINUED))
        return count

    def _varint(self, offset: int, end: int) -> tuple[int, int]:
        """(value, offset behind it)."""
        value = shift = 0
        while offset < end and shift < 70:
            byte = self._raw[offset]
            offset += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value, offset
            shift += 7
        raise _malformed()


def _truncates(sampling: list[bytes]) -> bool:
    """Whether only the end of the prompt is used. Pieces of one message on the wire make up that message."""
    return api.Sampling.FromString(b"".join(sampling)).truncate_prompt_tokens > 0


def _malformed() -> InvalidRequest:
    return InvalidRequest("the call's bytes are no GenerateRequest: use the client's own version of the API")
