"""Sends one oversize request from a separate process.

Started by ``faults.oversize`` as ``python -m farshore.benchmarks.faults.sender ADDRESS CASE``. It builds the
message, connects, prints a line, waits for a line on stdin, sends the message, and prints a JSON object with
the answer's code, details and time. Must not know the bars.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping

import grpc

from farshore.proto import inference_pb2 as api

MESSAGES = 300_000
ROLE_BYTES = 9_000_000
IDS_BYTES = 64 << 20
ENVELOPE_BYTES = 64
CONNECT_DEADLINE_S = 30.0
DEADLINE_S = 100.0


def _token_ids() -> bytes:
    """A message of almost 64 MiB of one-byte token ids, encoded by hand: a list of 67 million numbers would
    take gigabytes."""
    ids = bytes([5]) * (IDS_BYTES - ENVELOPE_BYTES)
    inner = b"\x0a" + _varint(len(ids)) + ids
    return b"\x22" + _varint(len(inner)) + inner


def _messages() -> bytes:
    chat = api.Chat(messages=[api.Message()] * MESSAGES)
    return api.GenerateRequest(chat=chat).SerializeToString()


def _filled_messages() -> bytes:
    """300,001 messages of a user, of which the first has content."""
    chat = api.Chat(messages=[api.Message(role="user", content="x")] + [api.Message(role="user")] * MESSAGES)
    return api.GenerateRequest(chat=chat).SerializeToString()


def _role() -> bytes:
    chat = api.Chat(messages=[api.Message(role="r" * ROLE_BYTES, content="x")])
    return api.GenerateRequest(chat=chat).SerializeToString()


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    return bytes([*made, value])


CASES: Mapping[str, Callable[[], bytes]] = {
    "64 MiB of token ids": _token_ids,
    "300,000 empty messages": _messages,
    "300,000 messages of a user": _filled_messages,
    "a role of 9 MB": _role,
}


def main(address: str, case: str) -> None:
    """Runs the protocol of the module's docstring for one of ``CASES``."""
    message = CASES[case]()
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(address, options=options) as channel:
        grpc.channel_ready_future(channel).result(CONNECT_DEADLINE_S)
        method = f"/{api.DESCRIPTOR.services_by_name['InferenceService'].full_name}/Generate"
        generate = channel.unary_stream(
            method, request_serializer=bytes, response_deserializer=api.GenerateEvent.FromString
        )
        print("ready", flush=True)
        sys.stdin.readline()
        begun_s = time.perf_counter()
        code, details = "OK", "it was not refused"
        try:
            # The first event would be Accepted; an accepted request is cancelled at once.
            call = generate(message, timeout=DEADLINE_S)
            next(call)
            call.cancel()
        except grpc.RpcError as error:
            code, details = error.code().name, error.details() or ""
        except StopIteration:
            details = "the stream was empty"
        took_s = time.perf_counter() - begun_s
        print(json.dumps({"code": code, "details": details, "took_s": took_s}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
