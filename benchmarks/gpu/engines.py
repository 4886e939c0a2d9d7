"""Engines in this process for the benchmark: on any device, with KV in their own memory or on shards.

Called by the sections and by ``dry``, which all run prompts through the engine's own path. It must not know
what is measured or expected.
"""

import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count, pairwise

import torch

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.client.base import ShardClient
from farshore.attention_offload.client.in_process import InProcessClient
from farshore.attention_offload.client.remote import RemoteClient
from farshore.attention_offload.plan.placement import ShardBy
from farshore.errors import DeadlineExceeded
from farshore.ids import FIRST_EPOCH, SequenceId, WorkerId
from farshore.kernels.formats import KVFormat
from farshore.kernels.host import HOST
from farshore.kernels.runtime.base import DeviceRuntime
from farshore.kernels.select import device_runtime
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.store import LocalStore
from farshore.models.llama import Llama
from farshore.sampling import Sampling
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.attention_model import attention_model
from farshore.workers.engine.engine import Engine
from farshore.workers.engine.sequence import Event, Failed, Finished, Sampled

ENGINE = WorkerId("engine")
DEADLINE_S = 300.0
"""For one event of a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where KV lies: in the engine's own memory unless there are shards."""

    shards: int = 0
    """Shards in this process."""
    shard_by: ShardBy = "range"
    shard_device: torch.device = HOST
    addresses: tuple[str, ...] = ()
    """Attention workers that run already, in place of shards in this process."""
    format: KVFormat | None = None
    """None: the model's dtype."""
    kv_bytes: int = 64 << 20
    """Of the engine, and of each shard in this process."""


@dataclass(slots=True)
class Answer:
    """One completion: its tokens, and the times (``perf_counter``) at which they came."""

    tokens: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)

    def gaps_s(self, *, skip: int = 0) -> tuple[float, ...]:
        """Seconds from each token to the next, without the first ``skip`` tokens."""
        return tuple(later - earlier for earlier, later in pairwise(self.token_s[skip:]))


class Running:
    """An engine that takes prompts."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._numbers = count()

    def answer(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Answer]:
        """Runs all prompts at the same time. Returns the choices of each, prompt by prompt. Raises a failed
        request's error, and DeadlineExceeded after ``DEADLINE_S`` without an event."""
        events: queue.SimpleQueue[tuple[int, float, Event]] = queue.SimpleQueue()
        answers = [[Answer() for _ in range(sampling.n)] for _ in prompts]

        def emit(index: int, event: Event) -> None:
            events.put((index, time.perf_counter(), event))

        for index, prompt in enumerate(prompts):
            name = SequenceId(f"prompt-{next(self._numbers)}")
            self.engine.submit(name, list(prompt), sampling, partial(emit, index), epoch=FIRST_EPOCH)
        ends = 0
        while ends < sampling.n * len(prompts):
            try:
                index, at_s, event = events.get(timeout=DEADLINE_S)
            except queue.Empty:
                raise DeadlineExceeded(f"the engine said nothing for {DEADLINE_S:.0f} s") from None
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Sampled):
                answers[index][event.choice].tokens.append(event.token_id)
                answers[index][event.choice].token_s.append(at_s)
            ends += isinstance(event, Finished)
        return [answer for choices in answers for answer in choices]


MakeRuntime = Callable[[torch.device], DeviceRuntime]
"""Makes the runtime of a device."""


@contextmanager
def running(
    model: Llama,
    placement: Placement,
    *,
    limits: EngineLimits | None = None,
    make_runtime: MakeRuntime = device_runtime,
) -> Iterator[Running]:
    """Starts an engine on the model's device; it stops with the context."""
    attention = attention_model(model.config, model.dtype, placement.format)
    arena = Arena(placement.kv_bytes, device=model.device)
    runtime = make_runtime(model.device)
    store = LocalStore(worker=ENGINE, arena=arena, runtime=None if runtime.is_host else runtime)
    with ExitStack() as stack:
        shards = _in_process(placement, attention, make_runtime)
        shards |= _remote(stack, placement, attention, model.dtype)
        own: Mapping[WorkerId, ShardClient] = {ENGINE: InProcessClient(ENGINE, store, attention)}
        engine = Engine(
            model=model,
            attention=attention,
            arena=arena,
            clients={**own, **shards},
            targets=list(shards or own),
            shard_by=placement.shard_by,
            limits=limits,
            runtime=runtime,
        )
        engine.start()
        stack.callback(engine.stop)
        yield Running(engine)


def _in_process(
    placement: Placement, attention: AttentionModel, make_runtime: MakeRuntime
) -> dict[WorkerId, ShardClient]:
    clients: dict[WorkerId, ShardClient] = {}
    for number in range(placement.shards):
        worker = WorkerId(f"shard{number}")
        arena = Arena(placement.kv_bytes, device=placement.shard_device)
        runtime = make_runtime(placement.shard_device)
        store = LocalStore(worker=worker, arena=arena, runtime=None if runtime.is_host else runtime)
        clients[worker] = InProcessClient(worker, store, attention)
    return clients


def _remote(
    stack: ExitStack, placement: Placement, attention: AttentionModel, dtype: torch.dtype
) -> dict[WorkerId, ShardClient]:
    clients: dict[WorkerId, ShardClient] = {}
    for address in placement.addresses:
        client = RemoteClient(address, attention, dtype)
        stack.callback(client.close)
        clients[client.identify().worker] = client
    return clients
