"""Sends prompts to the gRPC service of an engine, each in a call of its own, and notes when each token comes.

Used by ``pairs``, ``prefix`` and ``fairness``. It must not know what is compared.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from random import Random

import grpc

from farshore import rpc
from farshore.ids import FIRST_EPOCH
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc
from farshore.proto import inference_pb2 as api

MOST_STREAMS = 64
DEADLINE_S = 1800.0


@dataclass(slots=True)
class Asked:
    """One request, answered greedily, without stop tokens."""

    sent_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    """Tokens of the prompt whose KV was found stored."""

    @property
    def first_s(self) -> float:
        """Seconds until the first token."""
        return self.token_s[0] - self.sent_s


class Engine:
    """The client's end of one engine. Made by :func:`connected`."""

    def __init__(self, stub: pb_grpc.EngineStub, threads: ThreadPoolExecutor) -> None:
        self._stub = stub
        self._threads = threads
        self._name = uuid.uuid4().hex
        self._ids = count()

    def ask(self, prompt: Sequence[int], *, max_tokens: int) -> Asked:
        """Blocks until the answer is complete. Raises the engine's error."""
        sampling = api.Sampling(max_tokens=max_tokens, temperature=0)
        request = pb.SequenceRequest(
            sequence_id=f"{self._name}-{next(self._ids)}",
            epoch=FIRST_EPOCH,
            prompt=prompt,
            sampling=sampling,
        )
        asked = Asked(sent_s=time.perf_counter())
        message = pb.GatewayMessage(number=1, submit=request.SerializeToString())
        try:
            for reply in self._stub.Run(iter([message]), timeout=DEADLINE_S):
                for event in reply.events:
                    _add(event, asked)
        except grpc.RpcError as failure:
            raise rpc.error_of(failure, peer="the engine") from failure
        return asked

    def begin(self, prompt: Sequence[int], *, max_tokens: int) -> "Future[Asked]":
        """Asks from a thread."""
        return self._threads.submit(self.ask, prompt, max_tokens=max_tokens)


def _add(event: pb.SequenceEvent, asked: Asked) -> None:
    if event.HasField("token"):
        asked.token_s.append(time.perf_counter())
        asked.tokens.append(event.token.token_id)
    elif event.HasField("finished"):
        asked.cached_tokens = event.finished.cached_tokens
    elif event.HasField("failed"):
        raise rpc.error_of_status(rpc.code_of(event.failed.code), event.failed.message, peer="the engine")


@contextmanager
def connected(address: str) -> Iterator[Engine]:
    """Yields the engine at this address. Waits for its requests at the end."""
    with rpc.channel(address, None) as channel, ThreadPoolExecutor(MOST_STREAMS) as threads:
        yield Engine(pb_grpc.EngineStub(channel), threads)


def prompt(tokens: int, *, seed: int, vocab: int) -> list[int]:
    """Random token ids below ``vocab``. Prompts of different seeds begin differently."""
    draw = Random(seed)
    return [draw.randrange(vocab) for _ in range(tokens)]
