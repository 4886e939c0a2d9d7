"""The layer loops of host and device: logits do not depend on how rows are cut or on where their KV is."""

from functools import partial

import pytest
import torch

from farshore.attention_offload.fanout.fanout import Fanout
from farshore.attention_offload.plan.step_plan import Read, StepPlan
from farshore.errors import TransportError
from farshore.ids import Epoch, SequenceId, WorkerId
from farshore.kernels.runtime.deferring import DeferringRuntime
from farshore.kernels.select import implementation
from farshore.kvstore.base import SpanKey
from farshore.kvstore.store.tail import Tail
from farshore.models.device_llama import DeviceLlama
from farshore.workers.engine.decode.device.loop import DeviceLayerLoop
from farshore.workers.engine.decode.kernel_plans import LocalKV
from farshore.workers.engine.decode.step import LayerLoop

ENGINE = WorkerId("engine")
EPOCH = Epoch(1)
LENGTHS = {"a": 40, "b": 300, "c": 7, "d": 1, "e": 90, "f": 0}
"""Sequence -> its tokens in spans. The tail starts after them."""


class StepHarness:
    """Sequences with random KV in the stores of shards and of the engine, and with tails."""

    def __init__(self, cluster, tail_tokens, runtime):
        self.cluster = cluster
        self.runtime = runtime
        self.layout = cluster.attention.layouts[0]
        self.layer_loop = self.make_layer_loop()
        self.random = torch.Generator().manual_seed(1)
        self.reads = {name: self._spans(name, length) for name, length in LENGTHS.items()}
        self.tails = {name: self._tail(length, tail_tokens) for name, length in LENGTHS.items()}

    def make_layer_loop(self, local=True):
        """Returns an engine's layer loop. Unless ``local``, the engine's own store is read like a shard."""
        memory = self.cluster.arenas["engine"].memory
        loop = partial(DeviceLayerLoop, runtime=self.runtime) if self.runtime else LayerLoop
        return loop(
            model=self.cluster.model,
            attention=self.cluster.attention,
            kernels=implementation(memory.device, dtype=self.cluster.model.dtype),
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
        """Runs a step; returns its logits.

        ``rows`` names the sequence of each row; rows of one sequence are adjacent. The token of a row depends
        on its position only. Without ``commit`` the tails are truncated afterwards.
        """
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
            reads=({worker: tuple(of_worker) for worker, of_worker in reads.items()},),
        )
        with torch.inference_mode():
            out = self.layer_loop.run(
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
        """Stores random KV: by head group on two shards if ``length`` is odd, else by range on all shards.

        The KV does not depend on the number of shards.
        """
        workers = list(self.cluster.clients)
        if length % 2:
            cuts = [(workers[0], 0, length, 0, 1), (workers[1], 0, length, 1, self.layout.groups)]
        else:
            edges = [length * i // len(workers) for i in range(len(workers) + 1)]
            ranges = zip(workers, edges, edges[1:], strict=False)
            cuts = [(worker, a, b, 0, self.layout.groups) for worker, a, b in ranges if a < b]
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


@pytest.fixture(params=["host", "device"])
def over(tiny_model, rig, request):
    """over(shards) -> StepHarness."""
    made = []
    model, runtime, tail_tokens = tiny_model, None, 5
    if request.param == "device":
        # Steps take longer here, so that a tail begins close to the end of a block.
        tail_tokens = 200
        model = DeviceLlama(model.config, model.weights.dense())
        runtime = DeferringRuntime(seed=5)

    def build(shards):
        made.append(StepHarness(rig(model, shards=shards, memory_bytes=64 << 20), tail_tokens, runtime))
        return made[-1]

    yield build
    for harness in made:
        harness.close()


@pytest.fixture
def harness(over):
    return over(2)


@pytest.mark.parametrize("shards", [64, 130])
def test_a_sequence_may_lie_on_any_number_of_shards(harness, over, shards):
    """With 64 shards, 65 states are merged in every layer, the local one included."""
    many = over(shards)
    for rows in (["b"], ["a", "b", "b", "c", "e"]):
        torch.testing.assert_close(many.logits(rows, 1), harness.logits(rows, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("micro_batches", [2, 3, 4, 8])
def test_micro_batches_change_nothing(harness, micro_batches):
    rows = ["a", "b", "b", "b", "c", "d", "e", "e"]
    whole = harness.logits(rows, 1)
    cut = harness.logits(rows, micro_batches)
    assert torch.equal(cut.argmax(-1), whole.argmax(-1))
    # PyTorch's float32 products of one row and of several differ in the last bits.
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-5)


def test_rows_of_a_batch_equal_rows_alone(harness):
    rows = ["a", "c", "d", "e"]
    together = harness.logits(rows, 2)
    for row, name in enumerate(rows):
        torch.testing.assert_close(together[row], harness.logits([name], 1)[0], rtol=0, atol=1e-5)


def test_a_micro_batch_may_read_from_no_shard(harness):
    logits = harness.logits(["f", "a"], 2)
    for row, name in enumerate("fa"):
        torch.testing.assert_close(logits[row], harness.logits([name], 1)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_adjacent_rows_of_a_sequence_equal_successive_steps(harness, micro_batches):
    together = harness.logits(["b"] * 4, micro_batches)
    for row in range(4):
        (alone,) = harness.logits(["b"], 1, commit=True)
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-5)


def test_local_spans_may_be_read_like_those_of_a_shard(harness):
    rows = ["a", "b", "c", "d", "e"]
    local = harness.logits(rows, 2)
    harness.layer_loop = harness.make_layer_loop(local=False)
    torch.testing.assert_close(harness.logits(rows, 2), local, rtol=0, atol=1e-5)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("overlaps", [True, False])
def test_shards_that_overlap_with_the_engine_or_share_its_cores(
    harness, monkeypatch, overlaps, micro_batches
):
    """In both cases a step that a shard breaks leaves no trace."""
    monkeypatch.setattr(Fanout, "overlaps", lambda *_: overlaps)
    rows = ["a", "b", "b", "c", "e"]
    expected = harness.logits(rows, micro_batches)
    client = harness.cluster.clients[WorkerId("shard1")]
    for call in ("send", "wait"):
        with monkeypatch.context() as broken:
            broken.setattr(client, call, _break)
            with pytest.raises(TransportError, match="broken"):
                harness.logits(rows, micro_batches)
        for tail in harness.tails.values():
            tail.truncate(tail.end)
        assert torch.equal(harness.logits(rows, micro_batches), expected)


def _break(*args, **options):
    raise TransportError("broken")


def test_a_reused_plan_gives_the_logits_of_a_new_one(harness):
    """Tails grow into new blocks, rows are retried, and sequences come and go between the steps."""
    tail = harness.tails["b"]
    for step in range(260 - tail.end % 256 + 3):
        rows = ["b", "c", "e"] if step % 50 else ["c", "e", "e"]
        kept = harness.logits(rows, 1)
        if step % 40 == 0 or tail.end % 256 in (255, 0, 1):
            layer_loop, harness.layer_loop = harness.layer_loop, harness.make_layer_loop()
            fresh = harness.logits(rows, 1)
            harness.layer_loop = layer_loop
            assert torch.equal(kept, fresh), step
        harness.logits(["b"] if step % 3 else ["b", "c"], 1, commit=True)


@pytest.mark.parametrize("over", ["device"], indirect=True)
def test_nothing_runs_after_a_step_that_raised(harness, monkeypatch):
    """Its tails are truncated, and others may write to their blocks. The last call of a step asks for the
    most memory, so it is the one to find none."""
    runtime = harness.runtime

    def full(work):
        raise torch.OutOfMemoryError("no room for logits")

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "run_some", lambda: None)  # Work runs only where the host waits for it.
        patch.setattr(runtime.main, "run", full)
        with pytest.raises(torch.OutOfMemoryError):
            harness.logits(["a", "b", "e"], 2)
        loop = harness.layer_loop
        assert loop._batches and not any(stream._entries for pair in loop._streams for stream in pair)
    expected = harness.logits(["a", "b", "e"], 2)
    torch.testing.assert_close(harness.logits(["a", "b", "e"], 1), expected, rtol=0, atol=1e-5)
