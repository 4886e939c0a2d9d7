"""Translates an engine's events for one sequence into events of the request.

Made by ``engines.dispatch``, called by ``engines.engine_client``, which owns the connection. Must not know
about calls, deadlines or readers.
"""

from farshore.gateway.requests.completion import Completion
from farshore.gateway.requests.request import Request
from farshore.gateway.requests.validate import Job
from farshore.models.tokenizer.tokenizer import Tokenizer
from farshore.proto import cluster_pb2 as cluster
from farshore.proto import inference_pb2 as api


class Answer:
    """All completions of one request. Use it on the event loop only."""

    def __init__(self, request: Request, job: Job, tokenizer: Tokenizer) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._completions = [Completion(job, tokenizer) for _ in range(job.n)]
        self._ended: set[int] = set()
        self._queued_ms = 0.0
        self._cached_tokens = 0
        self._shards: dict[str, api.ShardUse] = {}

    @property
    def complete(self) -> bool:
        """Whether every completion has ended. The engine may not know it yet, after a stop string."""
        return all(completion.reason is not None for completion in self._completions)

    @property
    def engine_ended(self) -> bool:
        """Whether the engine has ended every completion."""
        return len(self._ended) == len(self._completions)

    def take(self, event: cluster.SequenceEvent) -> int | None:
        """Adds an engine's event. Returns the choice that the event's token ended with a stop string, which
        the engine must be told to end; else None."""
        kind = event.WhichOneof("kind")
        if kind == "token":
            return self._add(event.token)
        if kind == "prefill":
            self._request.add_prefill(event.prefill)
        elif kind == "prompt_logprobs":
            self._add_prompt(event.prompt_logprobs)
        elif kind == "finished":
            self._end_choice(event.finished)
        return None

    def end(self, reason: api.FinishReason) -> None:
        """Ends the request; completions that have not ended yet end with ``reason``."""
        for completion in self._completions:
            completion.end(reason)
        self._request.finish(
            [completion.summary() for completion in self._completions],
            queued_ms=self._queued_ms,
            cached_tokens=self._cached_tokens,
            shards=self._shards.values(),
        )

    def _add(self, token: cluster.SampledToken) -> int | None:
        completion = self._completions[token.choice]
        if completion.reason is not None:
            return None  # The token follows a stop string: the engine has not been told yet.
        self._request.add_token(
            token.token_id,
            completion.push(token.token_id),
            choice=token.choice,
            logprob=token.logprob if token.HasField("logprob") else None,
            top=[
                api.Alternative(
                    token_id=other.token_id,
                    logprob=other.logprob,
                    text=self._tokenizer.token_text(other.token_id),
                )
                for other in token.top
            ],
        )
        return None if completion.reason is None else token.choice

    def _add_prompt(self, scored: api.PromptLogprobs) -> None:
        """Adds tokens of the prompt; their texts are filled in here."""
        for token in scored.tokens:
            for named in (token, *token.top):
                named.text = self._tokenizer.token_text(named.token_id)
        self._request.add_prompt_logprobs(scored)

    def _end_choice(self, done: cluster.SequenceFinished) -> None:
        self._completions[done.choice].end(done.reason)
        if not self._ended:
            self._queued_ms = done.queued_ms
            self._cached_tokens = done.cached_tokens
        self._ended.add(done.choice)
        for use in done.shards:
            if use.worker_id in self._shards:
                self._shards[use.worker_id].attended_bytes += use.attended_bytes
            else:
                self._shards[use.worker_id] = use
        if self.engine_ended:
            self.end(done.reason)
