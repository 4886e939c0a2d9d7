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
class Token:
    """``text`` may be empty while a character is incomplete. ``index``: 0 for the first one."""

    index: int
    token_id: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardUse:
    """KV bytes that one worker's partial attention covered for this request."""

    worker_id: str
    process_id: int
    attended_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Last event. ``text``: the end of the answer that no token completed; often empty.

    ``ttft_ms``: from arrival at the gateway to the first token; ``tpot_ms``: mean per token after it.
    """

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    queued_ms: float
    ttft_ms: float
    tpot_ms: float
    total_ms: float
    shards: tuple[ShardUse, ...]
    text: str


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
    slow: bool
    """Beside the other attention workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """``kind``: dense or attention. ``state``: ready or unreachable. ``links``: of a dense worker."""

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
    workers: tuple[Worker, ...]
    sequences: tuple[Sequence, ...]
