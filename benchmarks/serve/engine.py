"""Runs the engine with KV in its own memory, as `farshore serve --placement local` does.

Used by ``load``. Uses the engine through its public interface only.
"""

import queue
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, pairwise
from typing import Self

import torch

from farshore.attention_offload.client.in_process import InProcessClient
from farshore.errors import DeadlineExceeded
from farshore.ids import FIRST_EPOCH, SequenceId, WorkerId
from farshore.kvstore.base import SpanKey
from farshore.kvstore.prefix import chain
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.store import LocalStore
from farshore.models.llama import Llama
from farshore.sampling import Sampling
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.attention_model import attention_model
from farshore.workers.engine.engine import Engine
from farshore.workers.engine.kv.prefix import fingerprint
from farshore.workers.engine.sequence import Event, Failed, Finished, Prefilled, Sampled

WORKER = WorkerId("dense")
DEADLINE_S = 3600.0
"""For one event of a request: a prompt of 32K tokens may take many minutes on a slow machine."""


class Request:
    """A request to the engine, with the times of its tokens. The engine's thread calls ``emit``."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self.cancel = cancel
        self.submitted_s = time.perf_counter()
        self.token_s: list[float] = []
        self.prefilled_s: dict[int, float] = {}
        """Prefilled tokens -> seconds since submission, from the engine's progress events."""
        self._events: queue.SimpleQueue[tuple[float, Event]] = queue.SimpleQueue()
        self._finished = False

    def emit(self, event: Event) -> None:
        self._events.put((time.perf_counter(), event))

    def wait(self, tokens: int | None = None) -> Self:
        """Blocks until there are ``tokens`` tokens, or until the end. Returns the request. Raises the error
        that the request failed with, or DeadlineExceeded."""
        while not self._finished and (tokens is None or len(self.token_s) < tokens):
            try:
                at_s, event = self._events.get(timeout=DEADLINE_S)
            except queue.Empty:
                raise DeadlineExceeded(f"no event of a request within {DEADLINE_S:.0f} s") from None
            if isinstance(event, Sampled):
                self.token_s.append(at_s)
            elif isinstance(event, Prefilled):
                self.prefilled_s[event.done_tokens] = at_s - self.submitted_s
            elif isinstance(event, Failed):
                raise event.error
            elif isinstance(event, Finished):
                self._finished = True
        return self

    def wait_after(self, begin_s: float, tokens: int) -> None:
        """As :meth:`wait`, for ``tokens`` tokens that came after ``begin_s``."""
        while not self._finished and sum(token_s > begin_s for token_s in self.token_s) < tokens:
            self.wait(len(self.token_s) + 1)

    @property
    def first_token_s(self) -> float:
        """Seconds from submission to the first token."""
        return self.token_s[0] - self.submitted_s

    def gaps_s(self, *, skip: int = 0) -> tuple[float, ...]:
        """Seconds from each token to the next, without the first ``skip`` tokens."""
        times = self.token_s[skip:]
        return tuple(b - a for a, b in pairwise(times))


class LocalEngine:
    """A context manager; the engine runs inside the context. Requests have no stop tokens: each generates
    ``max_tokens``."""

    def __init__(self, model: Llama, *, kv_bytes: int, limits: EngineLimits | None = None) -> None:
        self._model = model
        self._attention = attention_model(model.config, model.dtype)
        arena = Arena(kv_bytes)
        self._store = LocalStore(worker=WORKER, arena=arena)
        self._ids = count()
        self._engine = Engine(
            model=model,
            attention=self._attention,
            arena=arena,
            clients={WORKER: InProcessClient(WORKER, self._store, self._attention)},
            targets=[WORKER],
            shard_by="range",
            limits=limits,
        )

    def __enter__(self) -> Self:
        self._engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.stop()

    def submit(self, prompt: Sequence[int], *, max_tokens: int) -> Request:
        """Submits a prompt for greedy decoding."""
        name = SequenceId(f"request-{next(self._ids)}")
        request = Request(partial(self._engine.cancel, name))
        sampling = Sampling(max_tokens=max_tokens)
        self._engine.submit(name, list(prompt), sampling, request.emit, epoch=FIRST_EPOCH)
        return request

    def store_prefix(self, prompt: Sequence[int]) -> None:
        """Stores random KV for the full blocks of ``prompt``, sealed and named as if it had been prefilled,
        so that a request with this prompt reuses it. The values change no kernel's time."""
        model_fingerprint = fingerprint(self._attention, model_content=self._model.content)
        blocks = chain(prompt, fingerprint=model_fingerprint)
        layout, tokens = self._attention.layouts[0], blocks[-1].last
        name, epoch = SequenceId(f"stored-{next(self._ids)}"), FIRST_EPOCH
        key = SpanKey(sequence=name, layer_class=0, first=0, group0=0, group1=layout.groups)
        span = self._store.create(key, capacity_tokens=tokens, layout=layout, epoch=epoch)
        generator = torch.Generator().manual_seed(0)
        k = torch.randn(layout.k_heads, tokens, layout.k_dim, generator=generator).to(self._model.dtype)
        v = torch.randn(layout.v_heads, tokens, layout.v_dim, generator=generator).to(self._model.dtype)
        for layer in range(layout.layers):
            self._store.write(span, layer, 0, k, v, sequence=name, epoch=epoch)
        self._store.seal(span, tokens, sequence=name, epoch=epoch, blocks=blocks)
        self._store.drop_sequence(name, epoch=epoch)
