"""The gRPC ``Engine`` service of a dense worker; the gateway streams tokens from it.

Translates gRPC calls into engine calls and engine events into messages. Created by ``dense``. It must not
know how sequences run.
"""

import os
import queue
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc

from farshore import rpc
from farshore.attention_offload.base import ShardIdentity
from farshore.errors import FarshoreError, InvalidRequest
from farshore.ids import Epoch, SequenceId, WorkerId
from farshore.kvstore.store.store import LocalStore
from farshore.proto import admin_pb2 as admin
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc
from farshore.proto import inference_pb2 as api
from farshore.sampling import Sampling
from farshore.workers.engine.constraints.grammar import GrammarCompiler
from farshore.workers.engine.constraints.token_mask import TokenMask
from farshore.workers.engine.engine import Engine
from farshore.workers.engine.sequence import (
    Event,
    Failed,
    Finished,
    Prefilled,
    PromptLogprobs,
    PromptToken,
    Reason,
    Sampled,
)

PROMPT_SLICE_TOKENS = 16_384
"""Prompt tokens converted in one call. One slice holds the interpreter's lock for 0.4 ms; two million tokens
in one call held it for 81 ms."""

_REASONS = {
    Reason.STOP: api.FINISH_REASON_STOP,
    Reason.LENGTH: api.FINISH_REASON_LENGTH,
    Reason.CANCELLED: api.FINISH_REASON_CANCELLED,
}


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

    def Generate(
        self, request: pb.SequenceRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.SequenceEvent]:
        """Streams a request's events until all of its completions have ended; cancels it with the call."""
        sequence = SequenceId(request.sequence_id)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        sampling = Sampling.from_message(request.sampling)
        try:
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
                sequence,
                _tokens(request),
                sampling,
                events.put,
                epoch=Epoch(request.epoch),
                salt=request.cache_salt,
                mask=mask,
                priority=request.priority,
            )
        except FarshoreError as error:
            rpc.abort(context, error)
        # add_callback returns False if the client has already disconnected. The engine then ends the stream.
        if not context.add_callback(lambda: self._engine.cancel(sequence)):
            self._engine.cancel(sequence)
        context.send_initial_metadata(((rpc.TAKEN, "1"),))
        live = sampling.n
        while live:
            event = events.get()
            if isinstance(event, Failed):
                rpc.abort(context, event.error)
            yield self._message(event)
            live -= isinstance(event, Finished)

    def Cancel(self, request: pb.CancelSequence, context: grpc.ServicerContext) -> pb.CancelSequenceReply:
        """Cancels a request or one of its completions. Unknown ids are ignored."""
        choice = request.choice if request.HasField("choice") else None
        self._engine.cancel(SequenceId(request.sequence_id), choice=choice)
        return pb.CancelSequenceReply()

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

    def _message(self, event: Any) -> pb.SequenceEvent:
        match event:
            case Prefilled(done, total):
                progress = api.PrefillProgress(done_tokens=done, total_tokens=total)
                return pb.SequenceEvent(prefill=progress)
            case PromptLogprobs(first, tokens):
                scored = api.PromptLogprobs(first=first, tokens=[_prompt_token(token) for token in tokens])
                return pb.SequenceEvent(prompt_logprobs=scored)
            case Sampled(token, choice, logprob, top):
                others = [pb.TokenLogprob(token_id=id, logprob=value) for id, value in top]
                return pb.SequenceEvent(
                    token=pb.SampledToken(token_id=token, choice=choice, logprob=logprob, top=others)
                )
            case Finished(reason, queued_s, attended, choice, cached_tokens):
                uses = [
                    api.ShardUse(
                        worker_id=worker, process_id=self._shards[worker].process_id, attended_bytes=size
                    )
                    for worker, size in sorted(attended.items())
                ]
                return pb.SequenceEvent(
                    finished=pb.SequenceFinished(
                        reason=_REASONS[reason],
                        queued_ms=queued_s * 1e3,
                        shards=uses,
                        choice=choice,
                        cached_tokens=cached_tokens,
                    )
                )
        raise AssertionError(f"unknown event: {event}")


def _prompt_token(token: PromptToken) -> api.PromptToken:
    return api.PromptToken(
        token_id=token.token_id,
        logprob=token.logprob,
        rank=token.rank,
        top=[api.Alternative(token_id=id, logprob=value) for id, value in token.top],
    )


def _tokens(request: pb.SequenceRequest) -> list[int]:
    """Converts the prompt slice by slice, so that other threads can run between two slices."""
    tokens: list[int] = []
    for first in range(0, len(request.prompt), PROMPT_SLICE_TOKENS):
        tokens += request.prompt[first : first + PROMPT_SLICE_TOKENS]
    return tokens
