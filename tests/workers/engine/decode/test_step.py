"""The layer loop: however rows are cut, and wherever their KV is, they get the same logits."""

import pytest
import torch

from farshore.attention_offload.fanout.fanout import Fanout
from farshore.attention_offload.plan.step_plan import Read, StepPlan
from farshore.errors import TransportError
from farshore.ids import Epoch, SequenceId, WorkerId
from farshore.kvstore.base import SpanKey
from farshore.kvstore.store.tail import Tail
from farshore.workers.engine.decode.step import LocalKV, Steps

ENGINE = WorkerId("engine")
EPOCH = Epoch(1)
LENGTHS = {"a": 40, "b": 300, "c": 7, "d": 1, "e": 90}
"""Tokens in spans; the tail begins behind them."""


class Ground:
    """Sequences of random KV over shards, the engine's own store among them, and tails."""

    def __init__(self, cluster, tail_tokens):
        self.cluster = cluster
        self.layout = cluster.attention.layouts[0]
        self.steps = self.made()
        self.random = torch.Generator().manual_seed(1)
        self.reads = {name: self._spans(name, length) for name, length in LENGTHS.items()}
        self.tails = {name: self._tail(length, tail_tokens) for name, length in LENGTHS.items()}

    def made(self, local=True):
        """Steps as an engine has them; ``own`` False: its own store is a shard like the others."""
        memory = self.cluster.arenas["engine"].memory
        return Steps(
            model=self.cluster.model,
            attention=self.cluster.attention,
            shards=Fanout(self.cluster.clients, self.cluster.attention),
            local=LocalKV(memory, ENGINE, self.cluster.stores[ENGINE]) if local else LocalKV(memory),
        )

    def close(self):
        for tail in self.tails.values():
            tail.free()
        for worker, store in self.cluster.stores.items():
            for name in LENGTHS:
                store.drop_sequence(SequenceId(name), epoch=EPOCH)
            assert store.announce() == [], worker

    def logits(self, rows, micro_batches, *, commit=False):
        """``rows``: a name for each row; rows of one name follow each other. A token depends on its position
        alone."""
        positions = [self.tails[name].end + rows[:row].count(name) for row, name in enumerate(rows)]
        reads = {}
        for name in dict.fromkeys(rows):
            first = rows.index(name)
            for worker, read in self.reads[name]:
                span = read._replace(rows=range(first, first + rows.count(name)))
                reads.setdefault(worker, []).append(span)
        plan = StepPlan(
            step=1,
            groups=self.layout.groups,
            sequences=tuple(SequenceId(name) for name in rows),
            positions=tuple(positions),
            epochs={SequenceId(name): EPOCH for name in rows},
            reads=({worker: tuple(it) for worker, it in reads.items()},),
        )
        with torch.inference_mode():
            out = self.steps.run(
                plan,
                [(7 * position + 3) % 97 for position in positions],
                [self.tails[name] for name in rows],
                micro_batches=micro_batches,
            )
        for name, position in zip(rows, positions, strict=True):
            if commit:
                self.tails[name].advance(position + 1)
            else:
                self.tails[name].truncate(self.tails[name].end)
        return out

    def _tokens(self, count):
        k = torch.randn(self.layout.k_heads, count, self.layout.k_dim, generator=self.random)
        return k, torch.randn(self.layout.v_heads, count, self.layout.v_dim, generator=self.random)

    def _spans(self, name, length):
        """By range over all shards, or, every second sequence, by head group over two: the same KV however
        many shards there are."""
        workers = list(self.cluster.clients)
        if length % 2:
            cuts = [(workers[0], 0, length, 0, 1), (workers[1], 0, length, 1, self.layout.groups)]
        else:
            edges = [length * i // len(workers) for i in range(len(workers) + 1)]
            parts = zip(workers, edges, edges[1:], strict=False)
            cuts = [(worker, a, b, 0, self.layout.groups) for worker, a, b in parts if a < b]
        kv = [self._tokens(length) for _ in range(self.layout.layers)]
        reads = []
        for worker, first, last, group0, group1 in cuts:
            store = self.cluster.stores[worker]
            span = store.create(
                SpanKey(sequence=SequenceId(name), layer_class=0, first=first, group0=group0, group1=group1),
                capacity_tokens=last - first,
                layout=self.layout.of_groups(group1 - group0),
                epoch=EPOCH,
            )
            sequence = SequenceId(name)
            for layer, rows in enumerate(kv):
                k, v = (x[group0:group1, first:last] for x in rows)
                store.write(span, layer, 0, k, v, sequence=sequence, epoch=EPOCH)
            store.seal(span, last - first, sequence=sequence, epoch=EPOCH)
            reads.append((worker, Read(span, first, first, last, group0, group1, range(0, 1), sequence)))
        return reads

    def _tail(self, start, count):
        tail = Tail(arena=self.cluster.arenas["engine"], layout=self.layout, start=start)
        for layer in range(self.layout.layers):
            tail.append(layer, start, *self._tokens(count))
        tail.advance(start + count)
        return tail


@pytest.fixture
def over(tiny_model, rig):
    """over(shards) -> Ground."""
    made = []

    def build(shards):
        made.append(Ground(rig(tiny_model, shards=shards, memory_bytes=64 << 20), tail_tokens=5))
        return made[-1]

    yield build
    for it in made:
        it.close()


@pytest.fixture
def ground(over):
    return over(2)


@pytest.mark.parametrize("shards", [64, 130])
def test_a_sequence_may_lie_on_any_number_of_shards(ground, over, shards):
    """64 shards' states and the engine's own are 65 to merge in every layer."""
    many = over(shards)
    for rows in (["b"], ["a", "b", "b", "c", "e"]):
        torch.testing.assert_close(many.logits(rows, 1), ground.logits(rows, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("micro_batches", [2, 3, 4, 8])
def test_micro_batches_change_nothing(ground, micro_batches):
    rows = ["a", "b", "b", "b", "c", "d", "e", "e"]
    whole = ground.logits(rows, 1)
    cut = ground.logits(rows, micro_batches)
    assert torch.equal(cut.argmax(-1), whole.argmax(-1))
    # PyTorch's float32 products of one row and of several differ in the last bits.
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-5)


def test_every_row_is_what_it_would_be_alone(ground):
    rows = ["a", "c", "d", "e"]
    together = ground.logits(rows, 2)
    for row, name in enumerate(rows):
        torch.testing.assert_close(together[row], ground.logits([name], 1)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_rows_that_follow_each_other_are_steps_that_follow_each_other(ground, micro_batches):
    together = ground.logits(["b"] * 4, micro_batches)
    for row in range(4):
        (alone,) = ground.logits(["b"], 1, commit=True)
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-5)


def test_what_the_engine_has_may_as_well_be_a_shards(ground):
    rows = ["a", "b", "c", "d", "e"]
    local = ground.logits(rows, 2)
    ground.steps = ground.made(local=False)
    torch.testing.assert_close(ground.logits(rows, 2), local, rtol=0, atol=1e-5)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("overlaps", [True, False])
def test_shards_beside_the_engine_or_in_turns_with_it(ground, monkeypatch, overlaps, micro_batches):
    """And a step that a shard breaks leaves nothing behind either way."""
    monkeypatch.setattr(Fanout, "overlaps", lambda *_: overlaps)
    rows = ["a", "b", "b", "c", "e"]
    expected = ground.logits(rows, micro_batches)
    client = ground.cluster.clients[WorkerId("shard1")]
    for call in ("send", "wait"):
        with monkeypatch.context() as broken:
            broken.setattr(client, call, _break)
            with pytest.raises(TransportError, match="broken"):
                ground.logits(rows, micro_batches)
        for tail in ground.tails.values():
            tail.truncate(tail.end)
        assert torch.equal(ground.logits(rows, micro_batches), expected)


def _break(*args, **options):
    raise TransportError("broken")


def test_a_step_like_the_last_one_is_what_it_is_after_none(ground):
    """Plans are kept while tails grow into new blocks, rows are retried, and sequences come and go."""
    tail = ground.tails["b"]
    for step in range(260 - tail.end % 256 + 3):
        rows = ["b", "c", "e"] if step % 50 else ["c", "e", "e"]
        kept = ground.logits(rows, 1)
        if step % 40 == 0 or tail.end % 256 in (255, 0, 1):
            steps, ground.steps = ground.steps, ground.made()
            fresh = ground.logits(rows, 1)
            ground.steps = steps
            assert torch.equal(kept, fresh), step
        ground.logits(["b"] if step % 3 else ["b", "c"], 1, commit=True)
