"""The values that the SDK returns: frozen dataclasses, so that callers need no protobuf.

Created by ``sdk``, read by its callers and by the command line. Must not know about gRPC.
"""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The first event. ``request_id``: cancels the request, and resumes it if the caller chose the id."""

    request_id: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """Progress of the prompt, in tokens."""

    done_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A token and its natural log-probability, before bias, penalties and temperature."""

    token_id: int
    logprob: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptToken:
    """A token of the prompt. ``logprob``: given the tokens before it; None for the first. ``rank``: 1 for the
    likeliest; 0 for the first. ``top``: the likeliest tokens in its place, best first. ``text``: as an
    Alternative's."""

    token_id: int
    text: str
    logprob: float | None
    rank: int
    top: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobs:
    """Tokens of the prompt from index ``first`` on, if ``prompt_logprobs`` was given. All come before the
    first Token."""

    first: int
    tokens: tuple[PromptToken, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of an answer. ``index``: its number within its ``choice``, from 0. ``text``: the text that it
    completes; empty while a character, or a possible stop string, is incomplete. ``logprob`` and ``top`` (the
    likeliest tokens, best first) are given if they were asked for."""

    index: int
    token_id: int
    text: str
    choice: int = 0
    logprob: float | None = None
    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardUse:
    """KV bytes that one worker's partial attention read for this request."""

    worker_id: str
    process_id: int
    attended_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The end of one choice. ``tokens``: how many it has. ``text``: the text after its last token's; often
    empty."""

    reason: FinishReason
    tokens: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The last event. ``completion_tokens``: the tokens of all choices together. ``cached_tokens``: those of
    the prompt whose KV was found stored.

    ``queued_ms``: time in the engine's queue. ``ttft_ms``: from arrival at the gateway to the first token.
    ``tpot_ms``: mean time per token after the first.
    """

    choices: tuple[Completion, ...]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queued_ms: float
    ttft_ms: float
    tpot_ms: float
    total_ms: float
    shards: tuple[ShardUse, ...]

    @property
    def reason(self) -> FinishReason:
        """The first choice's reason; there is one choice unless more were asked for."""
        return self.choices[0].reason

    @property
    def text(self) -> str:
        """The first choice's ``text``."""
        return self.choices[0].text


Event = Accepted | Prefill | PromptLogprobs | Token | Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One whole completion. ``text`` is that of all its tokens and of its end."""

    text: str
    tokens: tuple[Token, ...]
    reason: FinishReason

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer, made of a stream's events. ``finished``: usage and times. The answer to a request that
    was resumed by its id has only the tokens that came since."""

    request_id: str
    choices: tuple[Choice, ...]
    finished: Finished

    @property
    def text(self) -> str:
        """The first choice's text; there is one choice unless more were asked for."""
        return self.choices[0].text

    @property
    def reason(self) -> FinishReason:
        """The first choice's reason."""
        return self.choices[0].reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A name that requests may give. ``root``: what the cluster loaded. ``max_positions``: of prompt and
    answer together. ``vocabulary``: tokens."""

    name: str
    root: str
    max_positions: int
    vocabulary: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A dense worker's connection to one attention worker. Times are from sending a layer's queries to having
    the attention state. ``transport``: "" if not connected."""

    worker_id: str
    transport: str
    frames: int
    failures: int
    p50_ms: float
    p99_ms: float
    deadline_ms: float
    """When an answer counts as late."""
    slow: bool
    """Whether it is slow compared with the other attention workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """``kind``: dense or attention. ``state``: ready, draining, failed (the process is alive but can't go on)
    or unreachable. A dense worker has sequences that are ``running``, ``waiting`` for their first memory or
    ``parked`` (they gave theirs back and wait for more). It counts its ``parkings`` and the generated
    ``tokens`` since it started. ``cached_bytes``: of ``free_bytes``, stored KV that no sequence uses.
    ``links``: its connections. ``device``: where it computes, and why there. ``node`` and ``zone``: the names
    of its machine and of that one's failure domain, where the operator gives them, as the Helm chart does.
    ``failure``: why a worker failed; empty in every other state."""

    worker_id: str
    kind: str
    device: str
    address: str
    host: str
    process_id: int
    state: str
    budget_bytes: int
    free_bytes: int
    cached_bytes: int
    attended_bytes: int
    running: int
    waiting: int
    parked: int
    parkings: int
    tokens: int
    links: tuple[Link, ...]
    node: str
    zone: str
    failure: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Stored KV of the positions [first, last) × the KV-head groups [group0, group1)."""

    worker_id: str
    first: int
    last: int
    group0: int
    group1: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """A live sequence. Its tail, the positions [tail_first, tokens), is in the engine."""

    sequence_id: str
    owner: str
    epoch: int
    tokens: int
    tail_first: int
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """The state of a cluster and the settings that are in force."""

    model: str
    dtype: str
    max_positions: int
    placement: str
    shard_by: str
    pool_budget_bytes: int
    pool_free_bytes: int
    version: str
    kv_format: str
    max_decode_stall_ms: float
    """Longest time from one token of an answer to its next while other prompts are prefilled."""
    speculate_tokens: int
    """Tokens guessed ahead per step by prompt lookup; 0: off."""
    workers: tuple[Worker, ...]
    sequences: tuple[Sequence, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterEvent:
    """Something that happened to the cluster's workers."""

    number: int
    unix_s: float
    kind: str
    """started, joined, lost, replaced, killed, draining, drained, retired, scaled or down; of the directory:
    unreachable and answers."""
    subject: str
    """A worker's id, or its slot before it has one."""
    detail: str
