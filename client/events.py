"""What the SDK hands out: plain frozen values, so that callers need no protobuf.

Made by ``sdk``, read by its callers and the CLI. Must not know about gRPC.
"""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """First event. ``request_id`` cancels the request and, if it was the caller's own, resumes it."""

    request_id: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """How much of the prompt is done."""

    done_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A token and its log-probability (natural), before bias, penalties and temperature."""

    token_id: int
    logprob: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """``index``: 0 for the first of its ``choice``. ``text`` may be empty while a character, or what may
    become a stop string, is incomplete. ``logprob`` and ``top`` (the likeliest, best first) if asked for."""

    index: int
    token_id: int
    text: str
    choice: int = 0
    logprob: float | None = None
    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardUse:
    """KV bytes that one worker's partial attention covered for this request."""

    worker_id: str
    process_id: int
    attended_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """How one choice ended. ``text``: the end of it that no token completed; often empty."""

    reason: FinishReason
    tokens: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Last event. ``completion_tokens``: of all choices.

    ``ttft_ms``: from arrival at the gateway to the first token; ``tpot_ms``: mean per token after it.
    """

    choices: tuple[Completion, ...]
    prompt_tokens: int
    completion_tokens: int
    queued_ms: float
    ttft_ms: float
    tpot_ms: float
    total_ms: float
    shards: tuple[ShardUse, ...]

    @property
    def reason(self) -> FinishReason:
        """Of the first choice: the only one, unless more were asked for."""
        return self.choices[0].reason

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text


Event = Accepted | Prefill | Token | Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A dense worker's way to one attention worker: from sending a layer's q to having its state."""

    worker_id: str
    transport: str
    frames: int
    failures: int
    p50_ms: float
    p99_ms: float
    deadline_ms: float
    """An answer that takes longer is late."""
    slow: bool
    """Beside the other attention workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """``kind``: dense or attention. ``state``: ready; failed (its process lives, and can't go on); or
    unreachable. ``links``: of a dense worker."""

    worker_id: str
    kind: str
    address: str
    host: str
    process_id: int
    state: str
    budget_bytes: int
    free_bytes: int
    attended_bytes: int
    running: int
    waiting: int
    links: tuple[Link, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Positions ``first`` .. ``last`` (exclusive) × head groups ``group0`` .. ``group1`` (exclusive)."""

    worker_id: str
    first: int
    last: int
    group0: int
    group1: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """The engine holds positions ``tail_first`` .. ``tokens`` (exclusive) itself."""

    sequence_id: str
    owner: str
    epoch: int
    tokens: int
    tail_first: int
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
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
    """From one token of an answer to its next, while other prompts are prefilled."""
    speculate_tokens: int
    """Guessed ahead by prompt lookup; 0: off."""
    workers: tuple[Worker, ...]
    sequences: tuple[Sequence, ...]
