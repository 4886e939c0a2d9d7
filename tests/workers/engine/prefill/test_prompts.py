"""Prefill in units: the same logits whatever comes between, in memory that does not grow with the prompt."""

import threading
from concurrent.futures import Future

import pytest
import torch

from farshore.errors import TransportError
from farshore.ids import SequenceId
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.kv.cache import SequenceCache
from farshore.workers.engine.kv.pool import Pool
from farshore.workers.engine.prefill import segment as prefill
from farshore.workers.engine.prefill.pacer import PrefillPacer
from farshore.workers.engine.prefill.prompts import Prompts
from farshore.workers.engine.sequence import Failed, Finished, Prefilled, Sampling, Sequence

GREEDY = Sampling(max_tokens=8, temperature=0.0)


def prompt_of(length, seed=0):
    return torch.randint(97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Ground:
    """Prefill without an engine's loop around it."""

    def __init__(self, cluster, segment_tokens):
        self.cluster = cluster
        self.news = threading.Event()
        self.pool = Pool(cluster.clients, cluster.targets, changed=self.news.set)
        self.cache = SequenceCache(
            arena=cluster.arenas["engine"],
            pool=self.pool,
            model=cluster.attention,
            shard_by=cluster.shard_by,
        )
        self.prompts = Prompts(
            model=cluster.model,
            attention=cluster.attention,
            pool=self.pool,
            cache=self.cache,
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
        """Logits behind the next prompt that is done."""
        with torch.inference_mode():
            while not (outcome := self.run_unit()).done:
                assert outcome.error is None, outcome.error
        return outcome.logits

    def run_unit(self):
        """What becomes of the next unit, once a prompt is runnable."""
        while (outcome := self.prompts.run_unit()) is None:
            assert self.news.wait(60)
            self.news.clear()
        return outcome


@pytest.fixture
def ground(rig):
    made = []

    def build(model, *, segment_tokens=512, **options):
        made.append(Ground(rig(model, **options), segment_tokens))
        return made[-1]

    yield build
    for it in made:
        it.pool.close()


def expected_logits(tiny, tokens):
    with torch.inference_mode():
        return tiny(torch.tensor([tokens])).logits[0, -1]


@pytest.mark.parametrize(
    "options",
    [{"local": True}, {"shards": 2}, {"shards": 3, "shard_by": "head"}, {"shards": 5, "shard_by": "both"}],
)
@pytest.mark.parametrize("length", [1, 255, 700, 1300])
def test_logits_behind_a_prompt_are_transformers(tiny, tiny_model, ground, monkeypatch, options, length):
    """However it is cut: segments of 512, pieces of the past of 200."""
    monkeypatch.setattr(prefill, "PIECE_TOKENS", 200)
    it = ground(tiny_model, memory_bytes=64 << 20, **options)
    sequence = it.add(prompt_of(length))
    torch.testing.assert_close(it.finish(), expected_logits(tiny, prompt_of(length)), rtol=0, atol=2e-5)
    assert sequence.committed == length
    it.cache.release(sequence)


def test_progress_is_told_and_only_rises(tiny_model, ground, monkeypatch):
    monkeypatch.setattr("farshore.workers.engine.prefill.prompts.PROGRESS_S", 0.0)
    it = ground(tiny_model, memory_bytes=64 << 20)
    sequence = it.add(prompt_of(1300))
    it.finish()
    it.cache.release(sequence)
    done = [event.done_tokens for _, event in it.events]
    assert all(isinstance(event, Prefilled) and event.total_tokens == 1300 for _, event in it.events)
    assert done == sorted(done) and {512, 1024, 1300} <= set(done)
    assert any(done_tokens % 256 for done_tokens in done[:-1]), "nothing between two segments"


def held(it):
    """Storages of all tensors that an object of ours holds: address -> bytes."""
    if isinstance(it, torch.Tensor):
        return {it.untyped_storage().data_ptr(): it.untyped_storage().nbytes()}
    if isinstance(it, Future):
        return held(it.result())
    if isinstance(it, dict):
        it = list(it.values())
    found = {}
    for part in it if isinstance(it, list | tuple) else ():
        found |= held(part)
    return found


def most_held(ground, model, length):
    it = ground(model, memory_bytes=64 << 20)
    sequence = it.add(prompt_of(length))
    weights = held(list(vars(model.weights).values()) if hasattr(model.weights, "__dict__") else [])
    most = 0
    with torch.inference_mode():
        while not it.run_unit().done:
            segment = it.prompts._queue[0].segment
            parts = [] if segment is None else [getattr(segment, name) for name in vars(segment)]
            now = held(parts)
            most = max(most, sum(size for at, size in now.items() if at not in weights))
    it.cache.release(sequence)
    return most


def test_memory_does_not_grow_with_the_prompt(tiny_model, ground, monkeypatch, capsys):
    """Between any two units a segment holds S hidden states, states and KV of one layer, and two pieces."""
    monkeypatch.setattr(prefill, "PIECE_TOKENS", 256)
    short, long = (most_held(ground, tiny_model, length) for length in (1100, 2047))
    config = tiny_model.config
    rows = (
        config.hidden
        + 2 * config.q_heads * config.head_dim
        + config.q_heads
        + 2 * config.kv_heads * config.head_dim
    )
    pieces = 2 * 256 * 2 * config.kv_heads * config.head_dim
    scratch = 3 * 256 * config.q_heads * (config.head_dim + 1)
    bound = 4 * (512 * rows + pieces + scratch) + 8 * 512
    with capsys.disabled():
        print(f"\nprefill holds {short:,} bytes at 1,100 tokens, {long:,} at 2,047; bound {bound:,}")
    assert short == long <= bound


def test_a_prompt_far_longer_than_the_engines_own_memory_runs(tiny, tiny_model, rig, submit):
    """The engine has two blocks for its tail; the prompt is seven, on the shards."""
    cluster = rig(tiny_model, shards=2, memory_bytes=64 << 20)
    cluster.resize(2 * cluster.attention.layouts[0].block_bytes)
    it = submit(cluster.start(limits=EngineLimits(segment_tokens=512)), "a", prompt_of(1800), GREEDY)
    assert isinstance(it.result(), Finished)
    ids = prompt_of(1800)
    with torch.inference_mode():
        for token in it.tokens:
            assert token == int(tiny(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)


class Failing:
    """A store whose chosen calls break once: what a network does."""

    def __init__(self, store, broken):
        self._store = store
        self._broken = broken
        self.calls = 0

    def __getattr__(self, name):
        call = getattr(self._store, name)
        if name not in ("read", "write", "seal"):
            return call

        def through(*args, **options):
            self.calls += 1
            if self.calls in self._broken:
                raise TransportError(f"{name} broke")
            return call(*args, **options)

        return through


@pytest.mark.parametrize("broken", [{1}, {2, 9}, {5, 6, 7}, {14, 40}, {20}])
def test_a_failed_call_loses_nothing(tiny, tiny_model, rig, submit, monkeypatch, broken):
    """Chosen reads, writes and seals break: the prompt is placed again, and what is sealed is found."""
    monkeypatch.setattr(prefill, "PIECE_TOKENS", 200)
    cluster = rig(tiny_model, shards=2, memory_bytes=64 << 20)
    failing = [Failing(cluster.clients[worker].store, broken) for worker in cluster.targets]
    for worker, store in zip(cluster.targets, failing, strict=True):
        cluster.clients[worker].store = store
    it = submit(cluster.start(limits=EngineLimits(segment_tokens=256)), "a", prompt_of(900), GREEDY)
    assert isinstance(it.result(), Finished)
    assert any(store.calls > min(broken) for store in failing)
    ids = prompt_of(900)
    with torch.inference_mode():
        for token in it.tokens:
            assert token == int(tiny(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)


def test_a_prompt_given_up_in_any_unit_leaves_nothing(tiny_model, ground):
    it = ground(tiny_model, shards=2, memory_bytes=64 << 20)
    for after in range(0, 40, 3):
        sequence = it.add(prompt_of(700))
        with torch.inference_mode():
            for _ in range(after):
                if it.run_unit().done:
                    break
        it.prompts.remove(sequence)
        it.cache.release(sequence)
        assert len(it.prompts) == 0
    it.cluster.check_empty()


def test_a_short_prompt_does_not_wait_for_a_long_one(tiny_model, ground):
    it = ground(tiny_model, memory_bytes=64 << 20, segment_tokens=256)
    sequences = [it.add(prompt_of(2000), "long"), it.add(prompt_of(300, 1), "short")]
    it.finish()
    assert [name for name, _ in it.events].count("long") <= 3
    it.finish()
    for sequence in sequences:
        it.cache.release(sequence)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_prefill_takes_what_running_sequences_can_wait():
    clock = Clock()
    pacer = PrefillPacer(200, clock=clock)
    took = {"unit": 0.010, "step": 0.030}

    def unit():
        clock.now += took["unit"]
        return True

    def between_tokens():
        start = clock.now
        pacer.turn(unit)
        with pacer.step():
            clock.now += took["step"]
        return clock.now - start

    gaps = [between_tokens() for _ in range(20)]
    assert all(gap <= 0.231 for gap in gaps) and gaps[-1] > 0.18
    took["step"] = 0.1
    between_tokens()
    assert all(0.17 <= between_tokens() <= 0.2 for _ in range(20))
    took["unit"] = 0.5  # longer than all of it: one at a time, for it must go on
    between_tokens()
    assert between_tokens() == pytest.approx(0.6)


def test_decoding_goes_on_while_a_long_prompt_is_prefilled(tiny, tiny_model, rig, submit):
    """With no time to stall there is one unit between two tokens; the tokens are the same."""
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
