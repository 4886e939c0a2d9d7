"""One sequence as its engine knows it: what was asked, what is committed, where its KV lies."""

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from farshore.attention_offload.placement import HeadClass
from farshore.errors import FarshoreError
from farshore.ids import Epoch, SequenceId, SpanId, WorkerId
from farshore.kvstore.tail import Tail


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


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Mutated by the engine's thread alone, but for ``cancelled``, which anybody may set.

    ``tokens`` is the prompt and everything sampled; KV exists for ``[0, committed)``: spans hold
    ``[0, tail.start)`` and the tail the rest.
    """

    id: SequenceId
    epoch: Epoch
    prompt_tokens: int
    tokens: list[int]
    sampling: Sampling
    emit: Callable[[Event], None]
    arrived_s: float
    choice: int = 0
    """Which of the request's completions this is."""
    queued_s: float = 0.0
    committed: int = 0
    classes: list[HeadClass] = field(default_factory=list)
    spans: list[PlacedSpan] = field(default_factory=list)
    tail: Tail | None = None
    refused_by: set[WorkerId] = field(default_factory=set)
    """Who did not take the tail's full blocks when last asked: dead, or full."""
    attended_bytes: dict[WorkerId, int] = field(default_factory=lambda: defaultdict(int))
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def most_tokens(self) -> int:
        """The longest it can get."""
        return self.prompt_tokens + self.sampling.max_tokens

    def finish_reason(self) -> Reason | None:
        """Why it is complete, or None while it is not."""
        if self.completion_tokens and self.tokens[-1] in self.sampling.stop_token_ids:
            return Reason.STOP
        if self.completion_tokens >= self.sampling.max_tokens:
            return Reason.LENGTH
        return None
