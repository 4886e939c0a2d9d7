"""Writes ``docs/api.md``, the reference of the API: ``python -P docs/generate/api.py``.

From the comments of the .proto files, the OpenAPI description, the errors and the limits, so that it says
what the code does. A test compares the committed file with what this writes. It needs the extra ``test``.
"""

import ast
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2 as pb
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo

from farshore import errors
from farshore.gateway.api.errors import status_of
from farshore.gateway.api.openai.errors import error_of
from farshore.gateway.api.openai.openapi import description
from farshore.gateway.limits import Limits
from farshore.gateway.requests.request import Failure, RequestFailed
from farshore.proto.check import describe
from farshore.rpc import OPTIONS

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "docs" / "api.md"

HEAD = """# API reference

Written by `docs/generate/api.py` from the code; a test holds it up to date. OpenAI's fields one by one:
[openai.md](openai.md).

## Connections

- The gateway serves gRPC at `--listen` and HTTP at `--http`, without TLS.
- **Deadlines.** A call's deadline and its cancellation end its request, which frees its KV within one
  step: at once, or, if the client chose a `request_id`, {grace_s:g} s later unless it reconnects.
- **Retries** are idempotent for requests with a `request_id`: the same id with the same content reads
  the first one's answer for {replay_s:g} s after its end; with other content it is ALREADY_EXISTS. All
  callers share the ids, so an id should be hard to guess. Over HTTP the id is the body's `request_id`;
  the header `X-Request-Id` is only sent back.
- **Resume.** `resume_from` counts the tokens received, at the gateway that runs the request. `resume`
  carries them, and any gateway goes on from there.
- **Message size.** A request may take {message_bytes} bytes (more for models of more than a million
  positions). Up to twice that it is refused with INVALID_ARGUMENT, beyond by gRPC itself with
  RESOURCE_EXHAUSTED.
- **Keepalive.** The server pings idle connections every {keepalive_s:g} s and drops those that do not
  answer within {keepalive_timeout_s:g} s. A client may ping every {ping_s:g} s, with or without calls;
  one that pings more often is disconnected (`ENHANCE_YOUR_CALM`).
- **Health** (`grpc.health.v1`): `""` and `farshore.inference.v1.InferenceService` serve while an engine
  takes requests, `farshore.admin.v1.AdminService` while the gateway is connected to the controller.
- **Reflection**: `grpc.reflection.v1` and `v1alpha`.

## Errors

A failed gRPC call has a `google.rpc.Status` in `grpc-status-details-bin`. Its `ErrorInfo` has the
domain `farshore` and one of these reasons; `BadRequest` names the field that is wrong; `RetryInfo`, and
the metadata `grpc-retry-pushback-ms`, say when to try again. HTTP errors are OpenAI's object, with the
field as `param`, and `Retry-After`.
"""

WHEN: dict[errors.FarshoreError, str] = {
    errors.InvalidRequest(""): "The request is wrong; the message says how to mend it.",
    errors.ModelError(""): "No such model.",
    errors.AlreadyExists(""): "The request_id belongs to a request with other content.",
    errors.ResumeMismatch(""): "The answer has other tokens than the received ones.",
    errors.NotFound(""): "No such request, or no such worker.",
    errors.Full("", free_bytes=0): "The pool of KV is too small for the request, even when it is empty.",
    errors.Overloaded(""): "A queue or a limit of running requests is full.",
    errors.TransportError(""): "A part of the cluster is not reached, or the gateway shuts down.",
    errors.Lost("", shards=()): "An attention worker with the request's KV was lost.",
    errors.Late("", shards=()): "Attention workers did not answer in time.",
    errors.Corrupt(""): "Stored KV was damaged.",
    errors.Fenced(""): "Another engine owns the sequence.",
    errors.DeadlineExceeded(""): "The reader took nothing, or an engine sent nothing, for too long.",
    errors.Internal(""): "A bug; the gateway's log has more.",
}

LIMITS = (
    *("max_live_requests", "max_readers", "readers_per_request", "message_bytes", "open_bytes", "messages"),
    *("tools", "sampling_bytes", "chars_per_position", "request_id_chars", "cache_salt_chars", "choices"),
    *("logprobs", "logit_biases", "stops", "stop_chars", "stop_token_ids", "allowed_token_ids", "bad_words"),
    *("structure_chars", "request_values", "batch_requests", "batch_values", "live_values", "replay_s"),
    *("replay_requests", "grace_s", "reader_stall_s", "stall_s"),
)


def text() -> str:
    """The whole of ``docs/api.md``."""
    with tempfile.TemporaryDirectory() as scratch:
        image = Path(scratch, "image.binpb")
        describe(image, "inference", "admin", comments=True, folder=ROOT / "proto")
        files = {file.name: file for file in pb.FileDescriptorSet.FromString(image.read_bytes()).file}
    lines = [_head(), *_errors(), "", "## Limits", "", *_limits()]
    for name in ("inference", "admin"):
        lines += ["", *Protocol(files[f"farshore/proto/{name}.proto"]).lines()]
    lines += ["", "## HTTP", "", *_http(description())]
    return "\n".join(lines) + "\n"


def _head() -> str:
    limits, options = Limits(), dict(OPTIONS)
    return (
        HEAD.format(
            grace_s=limits.grace_s,
            replay_s=limits.replay_s,
            message_bytes=limits.message_bytes,
            ping_s=limits.ping_interval_ms / 1e3,
            keepalive_s=options["grpc.keepalive_time_ms"] / 1e3,
            keepalive_timeout_s=options["grpc.keepalive_timeout_ms"] / 1e3,
        ).rstrip("\n")
        + "\n"
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    yield from (_row(head), _row("---" for _ in head))
    yield from map(_row, rows)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"


def _errors() -> Iterator[str]:
    rows = []
    for error, when in WHEN.items():
        failure = Failure.of(error)
        status = status_of(failure, retry_after_ms=1)
        info = ErrorInfo()
        status.details[0].Unpack(info)
        retry = any(detail.Is(RetryInfo.DESCRIPTOR) for detail in status.details)
        http = error_of(RequestFailed(failure), retry_after_ms=1).status
        if isinstance(error, errors.ModelError | errors.AlreadyExists):
            http = error_of(error, retry_after_ms=1).status
        rows.append((f"`{info.reason}`", failure.code.name, str(http), "yes" if retry else "", when))
    lost = grpc.StatusCode.UNAVAILABLE.name
    rows.append((f"`{lost}`", lost, "503", "yes", "The engine of the request was lost."))
    return _table(("reason", "gRPC", "HTTP", "retry", "when"), rows)


def _limits() -> Iterator[str]:
    """The value of each limit, with the text that its definition has."""
    (tree,) = (
        node
        for node in ast.parse((ROOT / "gateway" / "limits.py").read_text()).body
        if isinstance(node, ast.ClassDef)
    )
    said: dict[str, str] = {}
    for node, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
            said[ast.unparse(node.target)] = ast.literal_eval(after.value).replace("``", "`")
    limits = Limits()
    return _table(
        ("limit", "value", ""),
        ((f"`{name}`", str(getattr(limits, name)), said.get(name, "")) for name in LIMITS),
    )


class Protocol:
    """The reference of one .proto file."""

    def __init__(self, file: pb.FileDescriptorProto) -> None:
        self._file = file
        self._own = f".{file.package}."
        self._comments = {
            tuple(place.path): f"{place.leading_comments}\n{place.trailing_comments}"
            for place in file.source_code_info.location
        }

    def lines(self) -> Iterator[str]:
        for index, service in enumerate(self._file.service):
            yield from (f"## gRPC: `{self._file.package}.{service.name}`", "")
            for number, method in enumerate(service.method):
                streams = "stream " if method.server_streaming else ""
                takes, gives = self._link(method.input_type), self._link(method.output_type)
                yield f"**{method.name}** ({takes}) → {streams}{gives}"
                yield ""
                yield from self._paragraph(6, index, 2, number)
        for index, enum in enumerate(self._file.enum_type):
            yield from (f"### {enum.name}", "", *self._paragraph(5, index))
            rows = (
                (value.name, str(value.number), self._comment(5, index, 2, number))
                for number, value in enumerate(enum.value)
            )
            yield from (*_table(("value", "number", ""), rows), "")
        for index, message in enumerate(self._file.message_type):
            yield from (f"### {message.name}", "", *self._paragraph(4, index))
            if not message.field:
                yield from ("No fields.", "")
                continue
            rows = (
                (
                    f"`{field.name}`",
                    self._type(message, field),
                    str(field.number),
                    self._comment(4, index, 2, number),
                )
                for number, field in enumerate(message.field)
            )
            yield from (*_table(("field", "type", "number", ""), rows), "")

    def _paragraph(self, *path: int) -> Iterator[str]:
        if comment := self._comment(*path):
            yield from (comment, "")

    def _comment(self, *path: int) -> str:
        said = self._comments.get(path, "").splitlines()
        return " ".join(" ".join(line for line in said if "buf:lint" not in line).split())

    def _type(self, message: pb.DescriptorProto, field: pb.FieldDescriptorProto) -> str:
        entries = {f"{self._own}{message.name}.{kind.name}": kind for kind in message.nested_type}
        if field.type_name in entries:
            key, value = (self._scalar(entry) for entry in entries[field.type_name].field)
            return f"map of {key} to {value}"
        kind = self._scalar(field)
        if field.label == pb.FieldDescriptorProto.LABEL_REPEATED:
            return f"repeated {kind}"
        if field.proto3_optional:
            return f"optional {kind}"
        if field.HasField("oneof_index"):
            return f"{kind}, one of `{message.oneof_decl[field.oneof_index].name}`"
        return kind

    def _scalar(self, field: pb.FieldDescriptorProto) -> str:
        if field.type_name:
            return self._link(field.type_name)
        return pb.FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()

    def _link(self, name: str) -> str:
        own = name.removeprefix(self._own)
        return f"`{name.lstrip('.')}`" if own == name else f"[{own}](#{own.lower()})"


def _http(openapi: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            kind = _kind(body["schema"]) if body else ""
            statuses = ", ".join(operation["responses"])
            rows.append((f"`{method.upper()} {path}`", kind, statuses, operation["summary"]))
    yield from (*_table(("call", "body", "statuses", ""), rows), "")
    for name, schema in sorted(openapi["components"]["schemas"].items()):
        required = schema.get("required", ())
        fields = (
            (f"`{field}`", _kind(value), "required" if field in required else "")
            for field, value in schema["properties"].items()
        )
        yield f"### {name} (HTTP)"
        yield ""
        if said := schema.get("description"):
            yield from (" ".join(said.replace("``", "`").split()), "")
        yield from (*_table(("field", "type", ""), fields), "")


def _kind(schema: Mapping[str, Any]) -> str:
    """A JSON schema in words, without null, which every field takes for "not given"."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()}-http)"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            kinds = [_kind(one) for one in schema[several] if one.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return ", ".join(f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in values)
    kind = schema.get("type", "any value")
    if isinstance(kind, list):
        return " or ".join(one for one in kind if one != "null")
    if kind == "array":
        return f"array of {_kind(schema['items'])}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_kind(schema['additionalProperties'])}"
    return "null" if kind == "null" else kind


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
