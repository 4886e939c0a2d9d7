"""One sequence as its engine knows it: what was asked, what is committed, where its KV lies."""

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple

from farshore.attention_offload.plan.placement import GroupPlacement
from farshore.errors import FarshoreError
from farshore.ids import Epoch, SequenceId, SpanId, WorkerId
from farshore.kvstore.prefix import PrefixBlock
from farshore.kvstore.store.tail import Tail
from farshore.workers.engine.lookup import Lookup
from farshore.workers.engine.penalties import Seen


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a request's completions are drawn; the defaults change nothing. Checked at the gateway.

    ``workers.sampler`` says what each does, and in which order. Stop strings are the gateway's, which has
    the tokenizer.
    """

    max_tokens: int
    n: int = 1
    """Completions of the one prompt."""
    temperature: float = 0.0
    """0: greedy."""
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    logprobs: int | None = None
    """Alternatives to report beside the log-probability of each token; None: not even that."""
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()


class Holder:
    """One placement of one sequence. It holds spans until it is closed; then whatever a call that was still
    under way obtains for it is given back at once."""

    __slots__ = ("closed", "epoch", "sequence")

    def __init__(self, sequence: SequenceId, epoch: Epoch) -> None:
        self.sequence = sequence
        self.epoch = epoch
        self.closed = False


class Reason(Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class Prefilled(NamedTuple):
    done_tokens: int
    total_tokens: int


class Sampled(NamedTuple):
    """The next token of completion ``choice``; ``logprob`` and ``top`` as ``sampler.Choice`` has them."""

    token_id: int
    choice: int = 0
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Finished(NamedTuple):
    """Completion ``choice`` has ended. Every one of the n says so, however it ended (cancelled before there
    was more than the prompt, too); only Failed speaks for all."""

    reason: Reason
    queued_s: float
    attended_bytes: dict[WorkerId, int]
    choice: int = 0


class Failed(NamedTuple):
    """All of the request's completions end here."""

    error: FarshoreError


Event = Prefilled | Sampled | Finished | Failed


@dataclass(slots=True)
class PlacedSpan:
    """Positions ``first .. last``, groups ``group0 .. group1``, in ``span`` on ``worker``."""

    worker: WorkerId
    span: SpanId
    first: int
    last: int
    group0: int
    group1: int
    sealed: int
    """Position up to which it is sealed."""
    origin: int
    """Position of the span's own first token: the store counts from there."""
    capacity: int
    """Position up to which it was granted; above ``last`` it is still to be filled."""


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One completion of one request. Mutated by the engine's thread alone, but for ``cancelled``, which
    anybody may set.

    ``tokens`` is the prompt and everything sampled; KV exists for ``[0, committed)``: spans hold
    ``[0, tail.start)`` and the tail the rest.
    """

    id: SequenceId
    """Of the request; its choices share it."""
    epoch: Epoch
    order: int
    """Place in the order in which requests were taken on."""
    prompt_tokens: int
    tokens: list[int]
    sampling: Sampling
    emit: Callable[[Event], None]
    arrived_s: float
    fingerprint: bytes
    """All that its KV depends on beside its tokens: see ``kv.prefix.fingerprint``."""
    blocks: list[PrefixBlock] = field(default_factory=list)
    """Names of its whole blocks, as far as they were needed so far."""
    choice: int = 0
    """Which of the request's completions this is."""
    forked: bool = False
    """Whether the request's other completions are sequences of their own already."""
    lookup: Lookup | None = None
    """Proposes what may come next; None: nobody does."""
    seen: Seen = field(default_factory=Seen)
    """Its token ids as penalties count them."""
    queued_s: float | None = None
    """How long the request waited for its first placement; None: it waits still."""
    failures: int = 0
    """Retryable errors in a row."""
    runs_alone: bool = False
    """Whether its next step is its own: one with others failed, and whose fault that was is not known."""
    prefill_tokens: int = 0
    """Of the placement in force: tokens that prefill computes or finds, the tail begins behind them."""
    committed: int = 0
    classes: list[GroupPlacement] = field(default_factory=list)
    spans: list[PlacedSpan] = field(default_factory=list)
    """Changed in place or replaced: then :meth:`spans_changed`."""
    version: int = 0
    """Of ``spans``: equal versions mean equal reads."""
    workers: frozenset[WorkerId] = frozenset()
    """Where the spans lie."""
    tail: Tail | None = None
    holder: Holder | None = None
    """Of the placement in force; None: it has no memory."""
    refused_by: set[WorkerId] = field(default_factory=set)
    """Workers that did not take the tail's full blocks when last asked: dead, or full."""
    refused_at: int | None = None
    """Up to where no worker took them; None: some may."""
    attended_bytes: dict[WorkerId, int] = field(default_factory=lambda: defaultdict(int))
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def key(self) -> tuple[SequenceId, int]:
        """Names this choice among all sequences."""
        return self.id, self.choice

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def completions(self) -> int:
        """How many completions come of it: all of the request's until it is forked."""
        return 1 if self.forked else self.sampling.n

    @property
    def known_tokens(self) -> int:
        """Tokens whose KV comes before the next draw: the prompt; and later, all but the newest token."""
        return len(self.tokens) - 1 if self.forked else self.prompt_tokens

    @property
    def growth_tokens(self) -> int:
        """The most KV there can be of this choice beyond ``known_tokens``."""
        return self.prompt_tokens + self.sampling.max_tokens - self.known_tokens

    @property
    def placed_holder(self) -> Holder:
        """Its holder, which it has while it is placed."""
        assert self.holder is not None, f"sequence {self.key} has not been placed"
        return self.holder

    def spans_changed(self) -> None:
        self.version += 1
        self.workers = frozenset(span.worker for span in self.spans)

    @property
    def placed_tail(self) -> Tail:
        """Its tail, which it has while it is placed."""
        assert self.tail is not None, f"sequence {self.key} has not been placed"
        return self.tail

    def fork(self, choice: int) -> "Sequence":
        """Another completion of the same request, as yet without memory."""
        return replace(
            self,
            choice=choice,
            forked=True,
            tokens=list(self.tokens),
            blocks=list(self.blocks),
            seen=self.seen.copy(),
            spans=[],
            tail=None,
            holder=None,
            refused_by=set(),
            refused_at=None,
            failures=0,
            attended_bytes=defaultdict(int),
            cancelled=threading.Event(),
        )

    def finish_reason(self) -> Reason | None:
        """Why it is complete, or None while it is not."""
        if self.completion_tokens and self.tokens[-1] in self.sampling.stop_token_ids:
            return Reason.STOP
        if self.completion_tokens >= self.sampling.max_tokens:
            return Reason.LENGTH
        return None
