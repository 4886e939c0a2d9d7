"""The gRPC ``Engine`` service of a dense worker; gateways run their requests through it.

Translates gRPC calls into engine calls; ``gateway_stream`` holds the requests of each gateway. Created by
``dense``. It must not know how sequences run.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import grpc

from farshore.attention_offload.base import ShardIdentity
from farshore.errors import InvalidRequest
from farshore.ids import Epoch, SequenceId, WorkerId
from farshore.kvstore.store.store import LocalStore
from farshore.proto import admin_pb2 as admin
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc
from farshore.sampling import Sampling
from farshore.workers.engine.constraints.grammar import GrammarCompiler
from farshore.workers.engine.constraints.token_mask import TokenMask
from farshore.workers.engine.engine import Engine
from farshore.workers.engine.sequence import Event
from farshore.workers.gateway_stream import GatewayStream
from farshore.workers.sequence_events import EventMessages

PROMPT_SLICE_TOKENS = 16_384
"""Prompt tokens converted in one call. One slice holds the interpreter's lock for 0.4 ms; two million tokens
in one call held it for 81 ms."""

SUBMIT_THREADS = 8
MOST_SUBMITTING = 256
"""Requests that may wait for these threads; as many as may wait in the engine by default."""

_log = logging.getLogger(__name__)


class EngineService(pb_grpc.EngineServicer):
    """Serves one engine.

    ``shards`` maps every worker whose spans the engine reads to the identity that the worker reported when
    the engine connected. ``is_draining``: whether the engine refuses new requests because its worker is to
    end.
    """

    def __init__(
        self,
        *,
        worker: WorkerId,
        engine: Engine,
        store: LocalStore,
        shards: Mapping[WorkerId, ShardIdentity],
        grammars: GrammarCompiler,
        is_draining: Callable[[], bool] = lambda: False,
    ) -> None:
        self._worker = worker
        self._engine = engine
        self._store = store
        self._shards = shards
        self._is_draining = is_draining
        self._grammars = grammars
        self._messages = EventMessages(shards)
        self._pool = ThreadPoolExecutor(SUBMIT_THREADS, thread_name_prefix="submit")
        self._submitting = threading.Semaphore(MOST_SUBMITTING)
        self._lock = threading.Lock()
        self._streams: set[GatewayStream] = set()
        self._stopped = False

    def Run(
        self, messages: Iterator[pb.GatewayMessage], context: grpc.ServicerContext
    ) -> Iterator[pb.EngineMessage]:
        """Runs the requests of one gateway; cancels those that are left with the call."""
        stream = GatewayStream(
            self,
            message=self._messages,
            pool=self._pool,
            submitting=self._submitting,
            break_off=context.cancel,
        )
        with self._lock:
            self._streams.add(stream)
            if self._stopped:
                stream.end()
        # add_callback returns False if the gateway has already disconnected.
        if not context.add_callback(stream.close):
            stream.close()
        threading.Thread(target=_read, args=(stream, messages, context), name="gateway", daemon=True).start()
        try:
            yield from stream.messages()
        finally:
            stream.close()
            with self._lock:
                self._streams.discard(stream)

    def stop(self) -> None:
        """Ends the gateways' calls, each behind the events that the engine has emitted for it. Call it after
        the engine has stopped, and before the server does."""
        with self._lock:
            self._stopped = True
            for stream in self._streams:
                stream.end()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def submit(self, request: pb.SequenceRequest, emit: Callable[[Event], None]) -> None:
        """Checks a request and queues it. Raises FarshoreError."""
        sampling = Sampling.from_message(request.sampling)
        if not request.epoch:
            raise InvalidRequest("epoch 0: the gateway counts a sequence's epochs from 1")
        if request.fill:
            sampling = self._engine.lowered(len(request.prompt), sampling)
        self._engine.check_size(len(request.prompt), sampling)
        mask = TokenMask.of(
            sampling,
            vocab=self._grammars.vocab,
            bad_words=[tuple(word.ids) for word in request.bad_words],
            grammar=self._grammars.compile(request.grammar) if request.grammar else None,
        )
        self._engine.submit(
            SequenceId(request.sequence_id),
            _tokens(request),
            sampling,
            emit,
            epoch=Epoch(request.epoch),
            salt=request.cache_salt,
            mask=mask,
            priority=request.priority,
        )

    def cancel(self, sequence: SequenceId, *, choice: int | None = None) -> None:
        """Cancels a request or one of its completions. Unknown ids are ignored."""
        self._engine.cancel(sequence, choice=choice)

    def _state(self) -> admin.WorkerState:
        if self._engine.failure:
            return admin.WORKER_STATE_FAILED
        return admin.WORKER_STATE_DRAINING if self._is_draining() else admin.WORKER_STATE_READY

    def Status(self, request: pb.EngineStatusRequest, context: grpc.ServicerContext) -> pb.EngineStatus:
        """Reports the worker's memory and load, its links to shards, and its sequences."""
        usage = self._store.usage()
        load = self._engine.load()
        return pb.EngineStatus(
            worker=admin.WorkerStatus(
                worker_id=self._worker,
                kind=admin.WORKER_KIND_DENSE,
                host=socket.gethostname(),
                process_id=os.getpid(),
                state=self._state(),
                budget_bytes=usage.budget_bytes,
                free_bytes=usage.available_bytes,
                cached_bytes=usage.cached_bytes,
                attended_bytes=self._shards[self._worker].attended_bytes,
                running=load.running,
                waiting=load.waiting,
                parked=load.parked,
                parkings=load.parkings,
                tokens=load.tokens,
                links=[admin.ShardLink(**link._asdict()) for link in self._engine.links()],
            ),
            sequences=self._sequences(),
            shards=self._engine.shards(),
            readers=self._engine.readers(),
            drains=self._engine.drains(),
        )

    def _sequences(self) -> list[admin.SequenceStatus]:
        return [
            admin.SequenceStatus(
                sequence_id=f"{view.id}/{view.choice}" if view.choice else view.id,
                owner=self._worker,
                epoch=view.epoch,
                tokens=view.committed,
                tail_first=view.tail_first,
                spans=[
                    admin.SpanStatus(
                        worker_id=span.worker,
                        first=span.first,
                        last=span.last,
                        group0=span.group0,
                        group1=span.group1,
                        bytes=span.size_bytes,
                    )
                    for span in view.spans
                ],
            )
            for view in self._engine.views()
        ]


def _read(
    stream: GatewayStream, messages: Iterator[pb.GatewayMessage], context: grpc.ServicerContext
) -> None:
    """The thread that reads a call."""
    try:
        stream.read(messages)
    except grpc.RpcError:
        pass  # The call has ended.
    except Exception:
        _log.exception("a gateway's call ends: it said what no gateway says")
        context.cancel()


def _tokens(request: pb.SequenceRequest) -> list[int]:
    """Converts the prompt slice by slice, so that other threads can run between two slices."""
    tokens: list[int] = []
    for first in range(0, len(request.prompt), PROMPT_SLICE_TOKENS):
        tokens += request.prompt[first : first + PROMPT_SLICE_TOKENS]
    return tokens
