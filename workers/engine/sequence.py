"""The state of one sequence in its engine: its request, its committed tokens, and the location of its KV.

Shared by all modules of the engine. It must not know how steps or prefill run.
"""

import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple

from farshore.attention_offload.plan.placement import GroupPlacement
from farshore.errors import FarshoreError
from farshore.ids import Epoch, SequenceId, SpanId, WorkerId
from farshore.kvstore.prefix import PrefixBlock
from farshore.kvstore.store.tail import Tail
from farshore.sampling import Sampling
from farshore.workers.engine.constraints.token_mask import TokenMask
from farshore.workers.engine.lookup import PromptLookup
from farshore.workers.engine.penalties import TokenCounts


class Holder:
    """The claim of one placement of a sequence on its spans.

    Once ``closed`` is set, a span that a running call still obtains for this holder is given back at once.
    """

    __slots__ = ("closed", "epoch", "sequence")

    def __init__(self, sequence: SequenceId, epoch: Epoch) -> None:
        self.sequence = sequence
        self.epoch = epoch
        self.closed = False


class Reason(Enum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class Prefilled(NamedTuple):
    """Progress of a prompt's prefill, in tokens."""

    done_tokens: int
    total_tokens: int


class Sampled(NamedTuple):
    """The next token of completion ``choice``.

    ``logprob`` and ``top`` are those of ``sampler.DrawnToken``.
    """

    token_id: int
    choice: int = 0
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class PromptToken(NamedTuple):
    """A token of a prompt. ``logprob``: given the tokens before it; None for the first. ``rank``: 1 for the
    likeliest; 0 for the first. ``top``: the likeliest tokens in its place, best first."""

    token_id: int
    logprob: float | None = None
    rank: int = 0
    top: tuple[tuple[int, float], ...] = ()


class PromptLogprobs(NamedTuple):
    """Tokens of the prompt from index ``first`` on. All come, in order, before the first :class:`Sampled`."""

    first: int
    tokens: list[PromptToken]


class Finished(NamedTuple):
    """Completion ``choice`` has ended. Each of a request's n completions emits one, unless the request fails.

    This includes completions that are cancelled before the prompt is prefilled. ``queued_s`` is the time that
    the request waited for its first placement. ``attended_bytes`` counts KV bytes read, by worker.
    ``cached_tokens`` is the part of the prompt whose KV was found stored.
    """

    reason: Reason
    queued_s: float
    attended_bytes: dict[WorkerId, int]
    choice: int = 0
    cached_tokens: int = 0


class Failed(NamedTuple):
    """The request failed: all of its completions have ended."""

    error: FarshoreError


Event = Prefilled | PromptLogprobs | Sampled | Finished | Failed


@dataclass(slots=True)
class PlacedSpan:
    """Positions ``first .. last`` and groups ``group0 .. group1`` (ends excluded) in a span of a worker."""

    worker: WorkerId
    span: SpanId
    first: int
    last: int
    group0: int
    group1: int
    sealed: int
    """End of the sealed positions."""
    origin: int
    """Position of the span's first token. The store counts tokens from there."""
    capacity: int
    """End of the granted positions. Those from ``last`` on are not written yet."""


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One completion of one request. Only the engine's thread changes it; any thread may set ``cancelled``.

    ``tokens`` is the prompt followed by all sampled tokens. KV exists for positions ``[0, committed)``: spans
    hold ``[0, tail.start)`` and the tail holds the rest.
    """

    id: SequenceId
    """The id of the request. All of its choices share it."""
    epoch: Epoch
    order: int
    """Number of the request in the order of arrival."""
    priority: int = 0
    """Requests that wait for their first placement are placed by this number, the lowest first."""
    admitted: int = 0
    """Number of the request in the order of first placements; it means nothing before that placement."""
    prompt_tokens: int
    tokens: list[int]
    sampling: Sampling
    emit: Callable[[Event], None]
    arrived_s: float
    fingerprint: bytes
    """Digest of everything that the KV depends on except the tokens: see ``kv.prefix.fingerprint``."""
    blocks: list[PrefixBlock] = field(default_factory=list)
    """Hashes of its full blocks, computed as they are needed."""
    choice: int = 0
    """The number of this completion in its request."""
    forked: bool = False
    """Whether the request's other completions have their own sequences."""
    lookup: PromptLookup | None = None
    """Guesses the next tokens; None disables guessing."""
    mask: TokenMask | None = None
    """Which tokens may be drawn; None: all."""
    token_counts: TokenCounts = field(default_factory=TokenCounts)
    """Counts of token ids, for penalties."""
    queued_s: float | None = None
    """Seconds that the request waited for its first placement; None before that placement."""
    cached_tokens: int = 0
    """Tokens of the prompt that the first placement found stored."""
    prompt_logprobs_sent: int = 0
    """Tokens of the prompt whose log-probabilities were emitted."""
    failures: int = 0
    """Number of consecutive retryable errors."""
    runs_alone: bool = False
    """Whether its next step runs without other sequences: a step of several failed for an unknown cause."""
    prefill_tokens: int = 0
    """Tokens that the current placement computes by prefill or finds stored. The tail starts after them."""
    committed: int = 0
    classes: list[GroupPlacement] = field(default_factory=list)
    spans: list[PlacedSpan] = field(default_factory=list)
    """Call :meth:`spans_changed` after each change of the list or of a span in it."""
    version: int = 0
    """Version of ``spans``: equal versions mean equal reads."""
    workers: frozenset[WorkerId] = frozenset()
    """Workers that store the spans."""
    tail: Tail | None = None
    holder: Holder | None = None
    """Holder of the current placement; None while the sequence has no memory."""
    refused_by: set[WorkerId] = field(default_factory=set)
    """Workers that refused or did not answer the last hand-off of the tail's full blocks."""
    refused_boundary: int | None = None
    """End of the blocks that every worker refused; None if some worker may take them."""
    attended_bytes: dict[WorkerId, int] = field(default_factory=lambda: defaultdict(int))
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def key(self) -> tuple[SequenceId, int]:
        """Identifies this choice among all sequences of the engine."""
        return self.id, self.choice

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def completions(self) -> int:
        """Number of completions that this sequence stands for: n until it is forked, then 1."""
        return 1 if self.forked else self.sampling.n

    @property
    def owes_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of the prompt's tokens are still to be computed and emitted."""
        return self.sampling.prompt_logprobs is not None and self.prompt_logprobs_sent < self.prompt_tokens

    @property
    def known_tokens(self) -> int:
        """Tokens whose KV must precede the next draw: the prompt, or after the fork all but the newest."""
        return len(self.tokens) - 1 if self.forked else self.prompt_tokens

    @property
    def growth_tokens(self) -> int:
        """Most tokens of KV that this choice can need beyond ``known_tokens``."""
        return self.prompt_tokens + self.sampling.max_tokens - self.known_tokens

    @property
    def placed_holder(self) -> Holder:
        """The current holder. The sequence must be placed."""
        assert self.holder is not None, f"sequence {self.key} has not been placed"
        return self.holder

    def spans_changed(self) -> None:
        """Updates ``version`` and ``workers`` after a change of ``spans``."""
        self.version += 1
        self.workers = frozenset(span.worker for span in self.spans)

    @property
    def placed_tail(self) -> Tail:
        """The current tail. The sequence must be placed."""
        assert self.tail is not None, f"sequence {self.key} has not been placed"
        return self.tail

    def fork(self, choice: int) -> "Sequence":
        """Returns another completion of the same request, without memory."""
        return replace(
            self,
            choice=choice,
            forked=True,
            tokens=list(self.tokens),
            blocks=list(self.blocks),
            token_counts=self.token_counts.copy(),
            mask=self.mask.copy() if self.mask is not None else None,
            spans=[],
            tail=None,
            holder=None,
            refused_by=set(),
            refused_boundary=None,
            failures=0,
            attended_bytes=defaultdict(int),
            cancelled=threading.Event(),
        )

    def finish_reason(self) -> Reason | None:
        """Returns why the completion is complete, or None if it is not."""
        if self.completion_tokens and self.tokens[-1] in self.sampling.stop_token_ids:
            return Reason.STOP
        if self.completion_tokens >= self.sampling.max_tokens:
            return Reason.LENGTH
        return None
