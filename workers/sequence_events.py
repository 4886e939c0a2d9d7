"""The messages in which an engine's events travel to a gateway.

Used by ``engine_service``. It must not know calls, or how sequences run.
"""

from collections.abc import Mapping
from typing import NamedTuple

from farshore import rpc
from farshore.attention_offload.base import ShardIdentity
from farshore.errors import FarshoreError
from farshore.ids import WorkerId
from farshore.proto import cluster_pb2 as pb
from farshore.proto import inference_pb2 as api
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

_REASONS = {
    Reason.STOP: api.FINISH_REASON_STOP,
    Reason.LENGTH: api.FINISH_REASON_LENGTH,
    Reason.CANCELLED: api.FINISH_REASON_CANCELLED,
}


class Taken(NamedTuple):
    """The engine has accepted the request."""


class EventMessages:
    """Makes the messages. ``shards``: see :class:`~farshore.workers.engine_service.EngineService`."""

    def __init__(self, shards: Mapping[WorkerId, ShardIdentity]) -> None:
        self._shards = shards

    def __call__(self, number: int, event: Event | Taken) -> pb.SequenceEvent:
        """The message of an event of the request ``number``."""
        match event:
            case Sampled(token, choice, logprob, top):
                sampled = pb.SampledToken(token_id=token, choice=choice, logprob=logprob)
                for token_id, value in top:
                    sampled.top.add(token_id=token_id, logprob=value)
                return pb.SequenceEvent(number=number, token=sampled)
            case Prefilled(done, total):
                progress = api.PrefillProgress(done_tokens=done, total_tokens=total)
                return pb.SequenceEvent(number=number, prefill=progress)
            case PromptLogprobs(first, tokens):
                scored = api.PromptLogprobs(first=first, tokens=[_prompt_token(token) for token in tokens])
                return pb.SequenceEvent(number=number, prompt_logprobs=scored)
            case Finished():
                return pb.SequenceEvent(number=number, finished=self._finished(event))
            case Failed(error):
                return pb.SequenceEvent(number=number, failed=_failed(error))
            case Taken():
                return pb.SequenceEvent(number=number, taken=True)
        raise AssertionError(f"unknown event: {event}")

    def _finished(self, event: Finished) -> pb.SequenceFinished:
        uses = [
            api.ShardUse(worker_id=worker, process_id=self._shards[worker].process_id, attended_bytes=size)
            for worker, size in sorted(event.attended_bytes.items())
        ]
        return pb.SequenceFinished(
            reason=_REASONS[event.reason],
            queued_ms=event.queued_s * 1e3,
            shards=uses,
            choice=event.choice,
            cached_tokens=event.cached_tokens,
        )


def _failed(error: FarshoreError) -> pb.SequenceFailed:
    code, message, trailing = rpc.status_of(error)
    return pb.SequenceFailed(code=code.value[0], message=message, trailing=dict(trailing))


def _prompt_token(token: PromptToken) -> api.PromptToken:
    return api.PromptToken(
        token_id=token.token_id,
        logprob=token.logprob,
        rank=token.rank,
        top=[api.Alternative(token_id=id, logprob=value) for id, value in token.top],
    )
