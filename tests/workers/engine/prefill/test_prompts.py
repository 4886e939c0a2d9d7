"""Prefill in units: correct logits for any interleaving, in memory that does not grow with the prompt."""

import math
import threading
from concurrent.futures import Future

import pytest
import torch

from farshore.errors import TransportError
from farshore.ids import SequenceId
from farshore.kernels.runtime.immediate import ImmediateRuntime
from farshore.kernels.select import implementation
from farshore.sampling import Sampling
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.kv.cache import SequenceCache
from farshore.workers.engine.kv.pool import ShardPool
from farshore.workers.engine.prefill.pacer import PrefillPacer
from farshore.workers.engine.prefill.prompts import Prompts
from farshore.workers.engine.sequence import Failed, Finished, Prefilled, Sequence

from ....waiting import until

GREEDY = Sampling(max_tokens=8, temperature=0.0)
PAST_RANGE_TOKENS = "farshore.workers.engine.prefill.segment.PAST_RANGE_TOKENS"


def prompt_of(length, seed=0):
    return torch.randint(97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class PrefillHarness:
    """Prefill without an engine's loop."""

    def __init__(self, cluster, segment_tokens):
        self.cluster = cluster
        self.news = threading.Event()
        self.pool = ShardPool(cluster.clients, cluster.targets, changed=self.news.set)
        self.pool.await_beats(60)
        self.cache = SequenceCache(
            arena=cluster.arenas["engine"],
            pool=self.pool,
            model=cluster.attention,
            shard_by=cluster.shard_by,
        )
        self.prompts = Prompts(
            model=cluster.model,
            attention=cluster.attention,
            kernels=implementation(cluster.model.device, dtype=cluster.model.dtype),
            pool=self.pool,
            cache=self.cache,
            runtime=ImmediateRuntime(),
            local=None,
            segment_tokens=segment_tokens,
        )
        self.events = []

    def add(self, tokens, name="a"):
        sequence = Sequence(
            id=SequenceId(name),
            epoch=next(self.cluster.epochs),
            order=0,
            prompt_tokens=len(tokens),
            tokens=list(tokens),
            sampling=GREEDY,
            emit=lambda event: self.events.append((name, event)),
            arrived_s=0.0,
            fingerprint=b"",
        )
        self.cache.place(sequence, promised_tokens=0)
        self.prompts.add(sequence)
        return sequence

    def finish(self):
        """Runs units until a prompt is done; returns the logits after it."""
        with torch.inference_mode():
            while not (outcome := self.run_unit()).done:
                assert outcome.error is None, outcome.error
        return outcome.logits

    def run_unit(self):
        """Waits for a runnable prompt and runs a unit; returns its outcome."""
        while (outcome := self.prompts.run_unit()) is None:
            assert self.news.wait(60)
            self.news.clear()
        return outcome


@pytest.fixture
def make_prefill(rig):
    made = []

    def build(model, *, segment_tokens=512, **options):
        made.append(PrefillHarness(rig(model, **options), segment_tokens))
        return made[-1]

    yield build
    for harness in made:
        harness.pool.close()


def expected_logits(tiny, tokens):
    with torch.inference_mode():
        return tiny(torch.tensor([tokens])).logits[0, -1]


@pytest.mark.parametrize(
    "options",
    [{"local": True}, {"shards": 2}, {"shards": 3, "shard_by": "head"}, {"shards": 5, "shard_by": "both"}],
)
@pytest.mark.parametrize("length", [1, 255, 700, 1300])
def test_logits_after_a_prompt_equal_transformers(
    tiny, tiny_model, make_prefill, monkeypatch, options, length
):
    """Segments of 512 tokens, past ranges of 200."""
    monkeypatch.setattr(PAST_RANGE_TOKENS, 200)
    prefill = make_prefill(tiny_model, memory_bytes=64 << 20, **options)
    sequence = prefill.add(prompt_of(length))
    torch.testing.assert_close(prefill.finish(), expected_logits(tiny, prompt_of(length)), rtol=0, atol=2e-5)
    assert sequence.committed == length
    prefill.cache.release(sequence)


def test_progress_is_reported_and_only_rises(tiny_model, make_prefill, monkeypatch):
    monkeypatch.setattr("farshore.workers.engine.prefill.prompts.PROGRESS_S", 0.0)
    prefill = make_prefill(tiny_model, memory_bytes=64 << 20)
    sequence = prefill.add(prompt_of(1300))
    prefill.finish()
    prefill.cache.release(sequence)
    done = [event.done_tokens for _, event in prefill.events]
    assert all(isinstance(event, Prefilled) and event.total_tokens == 1300 for _, event in prefill.events)
    assert done == sorted(done) and {512, 1024, 1300} <= set(done)
    assert any(done_tokens % 256 for done_tokens in done[:-1]), "no progress within a segment"


def held(value):
    """Storages of all tensors in ``value``, recursively: address -> bytes."""
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()}
    if isinstance(value, Future):
        return held(value.result())
    if isinstance(value, dict):
        value = list(value.values())
    found = {}
    for element in value if isinstance(value, list | tuple) else ():
        found |= held(element)
    return found


def most_held_bytes(make_prefill, model, length):
    prefill = make_prefill(model, memory_bytes=64 << 20)
    sequence = prefill.add(prompt_of(length))
    weights = held(list(vars(model.weights).values()) if hasattr(model.weights, "__dict__") else [])
    most = 0
    with torch.inference_mode():
        while not prefill.run_unit().done:
            segment = prefill.prompts._queue[0].segment
            storages = held([] if segment is None else [getattr(segment, name) for name in vars(segment)])
            most = max(most, sum(size for address, size in storages.items() if address not in weights))
    prefill.cache.release(sequence)
    return most


def test_memory_does_not_grow_with_the_prompt(tiny_model, make_prefill, monkeypatch, capsys):
    """Between units a segment holds S hidden states, one layer's q, k, v and states, and 2 past ranges."""
    monkeypatch.setattr(PAST_RANGE_TOKENS, 256)
    short, long = (most_held_bytes(make_prefill, tiny_model, length) for length in (1100, 2047))
    config = tiny_model.config
    rows = (
        config.hidden
        + 2 * config.q_heads * config.head_dim
        + config.q_heads
        + 2 * config.kv_heads * config.head_dim
    )
    past_ranges = 2 * 256 * 2 * config.kv_heads * config.head_dim
    scratch = 3 * 256 * config.q_heads * (config.head_dim + 1)
    bound = 4 * (512 * rows + past_ranges + scratch) + 8 * 512
    with capsys.disabled():
        print(f"\nprefill holds {short:,} bytes at 1,100 tokens, {long:,} at 2,047; bound {bound:,}")
    assert short == long <= bound


def test_a_prompt_far_longer_than_the_engines_own_memory_runs(tiny, tiny_model, rig, submit):
    """The engine's own memory has two blocks, for the tail; the prompt takes seven blocks on the shards."""
    cluster = rig(tiny_model, shards=2, memory_bytes=64 << 20)
    cluster.resize(2 * cluster.attention.layouts[0].block_bytes)
    collected = submit(cluster.start(limits=EngineLimits(segment_tokens=512)), "a", prompt_of(1800), GREEDY)
    assert isinstance(collected.result(), Finished)
    ids = prompt_of(1800)
    with torch.inference_mode():
        for token in collected.tokens:
            assert token == int(tiny(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)


class Failing:
    """A store whose chosen calls fail once, as over a network."""

    def __init__(self, store, broken):
        self._store = store
        self._broken = broken
        self.calls = 0

    def __getattr__(self, name):
        call = getattr(self._store, name)
        if name not in ("read", "write", "seal"):
            return call

        def counted(*args, **options):
            self.calls += 1
            if self.calls in self._broken:
                raise TransportError(f"{name} broke")
            return call(*args, **options)

        return counted


@pytest.mark.parametrize("broken", [{1}, {2, 9}, {5, 6, 7}, {14, 40}, {20}])
def test_a_failed_call_loses_nothing(tiny, tiny_model, rig, submit, monkeypatch, broken):
    """Chosen reads, writes and seals fail; the prompt is placed again, and sealed blocks are found."""
    monkeypatch.setattr(PAST_RANGE_TOKENS, 200)
    cluster = rig(tiny_model, shards=2, memory_bytes=64 << 20)
    failing = [Failing(cluster.clients[worker].store, broken) for worker in cluster.targets]
    for worker, store in zip(cluster.targets, failing, strict=True):
        cluster.clients[worker].store = store
    collected = submit(cluster.start(limits=EngineLimits(segment_tokens=256)), "a", prompt_of(900), GREEDY)
    assert isinstance(collected.result(), Finished)
    assert any(store.calls > min(broken) for store in failing)
    ids = prompt_of(900)
    with torch.inference_mode():
        for token in collected.tokens:
            assert token == int(tiny(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)


def test_a_prompt_removed_after_any_unit_leaves_nothing(tiny_model, make_prefill):
    prefill = make_prefill(tiny_model, shards=2, memory_bytes=64 << 20)
    for after in range(0, 40, 3):
        sequence = prefill.add(prompt_of(700))
        with torch.inference_mode():
            for _ in range(after):
                if prefill.run_unit().done:
                    break
        prefill.prompts.remove(sequence)
        prefill.cache.release(sequence)
        assert len(prefill.prompts) == 0
    prefill.cluster.check_empty()


def test_a_short_prompt_does_not_wait_for_a_long_one(tiny_model, make_prefill, monkeypatch):
    monkeypatch.setattr("farshore.workers.engine.prefill.prompts.PROGRESS_S", math.inf)  # Seals only.
    prefill = make_prefill(tiny_model, memory_bytes=64 << 20, segment_tokens=256)
    sequences = [prefill.add(prompt_of(2000), "long"), prefill.add(prompt_of(300, 1), "short")]
    with torch.inference_mode():
        while not prefill.run_unit().done:
            # While one prompt waits for a shard the other goes on, which is not what is counted here.
            until(lambda: all(prompt.is_runnable for prompt in prefill.prompts._queue))
    assert [name for name, _ in prefill.events] == ["long", "short", "long", "short"]
    prefill.finish()
    for sequence in sequences:
        prefill.cache.release(sequence)


def test_prefill_uses_the_time_that_running_sequences_can_wait(clock):
    pacer = PrefillPacer(200, clock=clock)
    took = {"unit": 0.010, "step": 0.030}

    def unit():
        clock.now_s += took["unit"]
        return True

    def between_tokens():
        start = clock.now_s
        pacer.run_units(unit)
        with pacer.step():
            clock.now_s += took["step"]
        return clock.now_s - start

    gaps = [between_tokens() for _ in range(20)]
    assert all(gap <= 0.231 for gap in gaps) and gaps[-1] > 0.18
    took["step"] = 0.1
    between_tokens()
    assert all(0.17 <= between_tokens() <= 0.2 for _ in range(20))
    took["unit"] = 0.5  # Longer than the whole stall: one unit runs between two steps.
    between_tokens()
    assert between_tokens() == pytest.approx(0.6)


def test_decoding_continues_while_a_long_prompt_is_prefilled(tiny, tiny_model, rig, submit):
    """With a stall of 0 ms one unit runs between two tokens; the tokens are the same."""
    cluster = rig(tiny_model, shards=2, memory_bytes=64 << 20)
    limits = EngineLimits(max_decode_stall_ms=0.0, segment_tokens=512)
    engine = cluster.start(limits=limits)
    first = submit(engine, "a", prompt_of(40), Sampling(max_tokens=400))
    first.events.get(timeout=60)
    second = submit(engine, "b", prompt_of(1900, 1), GREEDY)
    seen = []
    while not isinstance(event := second.events.get(timeout=60), Finished | Failed):
        seen.append(event)
    assert isinstance(event, Finished)
    assert isinstance(first.result(), Finished)
    quiet = cluster.start(limits=EngineLimits(max_decode_stall_ms=1e6))
    for name, prompt, collected in (("c", prompt_of(40), first.tokens), ("d", prompt_of(1900, 1), None)):
        alone = submit(quiet, name, prompt, Sampling(max_tokens=400) if collected else GREEDY)
        assert isinstance(alone.result(), Finished)
        if collected:
            assert alone.tokens[-len(collected) :] == collected
        else:
            assert alone.tokens == [e.token_id for e in seen if not isinstance(e, Prefilled)]
