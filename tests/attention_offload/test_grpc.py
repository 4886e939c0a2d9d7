"""The data plane over real gRPC on loopback: the same bits, the same errors, nothing lost when it breaks."""

import os
import queue
import signal
import subprocess
import sys
import threading

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.fanout import Fanout
from farshore.attention_offload.grpc_peer import WRITE_CHUNK_BYTES, GrpcPeer
from farshore.attention_offload.grpc_server import READ_CHUNK_BYTES, AttentionService, serve
from farshore.attention_offload.in_process import InProcessPeer
from farshore.attention_offload.plan import Read, ShardStep, StepPlan
from farshore.errors import (
    DeadlineExceeded,
    FarshoreError,
    Fenced,
    Full,
    InvalidRequest,
    NotFound,
    PortInUse,
    TransportError,
)
from farshore.ids import Epoch, SequenceId, SpanId, WorkerId
from farshore.kernels.base import AttentionSpec, KVLayout
from farshore.kvstore.arena import Arena
from farshore.kvstore.base import SpanKey
from farshore.kvstore.store import LocalStore
from farshore.workers.attention_model import attention_model
from farshore.workers.engine import Engine
from farshore.workers.sequence import Finished, Sampled, Sampling

ATTENTION = "farshore.attention.v1.Attention"
SHARD = WorkerId("shard")
OLD, OWNER, NEW = Epoch(1), Epoch(2), Epoch(3)
SPEC = AttentionSpec(q_heads=6, k_heads=3, v_heads=3, k_dim=8, v_dim=6, scale=8**-0.5)
LAYERS = 2
DEADLINE_S = 60.0


def model_of(dtype):
    """Blocks of 16 tokens, so that short spans cross several."""
    layout = KVLayout.of(SPEC, layers=LAYERS, dtype=dtype)._replace(block_tokens=16)
    return AttentionModel(specs=(SPEC,), layer_class=(0,) * LAYERS, layouts=(layout,))


MODEL = model_of(torch.float32)
LAYOUT = MODEL.layouts[0]


class Shard:
    """A store behind a gRPC server that can be stopped, and started again on the same port."""

    def __init__(self, *, service=AttentionService, worker=SHARD, memory_bytes=8 << 20):
        self.store = LocalStore(worker=worker, arena=Arena(memory_bytes))
        self.service = service(worker, self.store)
        self.server, self.address = serve(self.service, "127.0.0.1:0")

    def stop(self):
        assert self.server.stop(None).wait(DEADLINE_S)

    def restart(self):
        self.stop()
        self.server, _ = serve(self.service, self.address)


@pytest.fixture
def start_shard():
    started = []

    def start(**options):
        started.append(Shard(**options))
        return started[-1]

    yield start
    for shard in started:
        shard.stop()
        shard.store.check_integrity()


@pytest.fixture
def shard(start_shard):
    return start_shard()


@pytest.fixture
def connect():
    peers = []

    def to(address, model=MODEL, **options):
        peers.append(GrpcPeer(address, model, model.layouts[0].dtype, **options))
        return peers[-1]

    yield to
    for peer in peers:
        peer.close()


def tokens_of(layout, count, *, seed=0):
    """Random k and v of ``count`` tokens."""
    random = torch.Generator().manual_seed(seed)
    k = torch.randn(layout.groups * layout.k_heads_per_group, count, layout.k_dim, generator=random)
    v = torch.randn(layout.groups * layout.v_heads_per_group, count, layout.v_dim, generator=random)
    return k.to(layout.dtype), v.to(layout.dtype)


def key_of(name, *, first=0, group0=0, group1=3):
    return SpanKey(sequence=SequenceId(name), layer_class=0, first=first, group0=group0, group1=group1)


def sealed_span(store, layout, name, first, last, group0=0, group1=3):
    """A full span of random tokens; returns the read of all of it."""
    layout = layout.of_groups(group1 - group0)
    key = key_of(name, first=first, group0=group0, group1=group1)
    span = store.create(key, capacity_tokens=last - first, layout=layout, epoch=OWNER)
    for layer in range(layout.layers):
        k, v = tokens_of(layout, last - first, seed=first + layer)
        store.write(span, layer, 0, k, v, epoch=OWNER)
    store.seal(span, last - first, epoch=OWNER)
    return Read(span, first, first, last, group0, group1, range(0, 1))


def step_of(reads, *, positions=(100,), number=1, group0=0, group1=3):
    return ShardStep(number, tuple(range(len(positions))), tuple(positions), group0, group1, (tuple(reads),))


def query(rows, groups, dtype=torch.float32, *, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, groups * SPEC.q_heads_per_group, SPEC.k_dim, generator=random).to(dtype)


def run_step(peer, step, dtype=torch.float32):
    """Every layer's state, as raw bytes: what two peers must agree on."""
    peer.begin(step)
    states = []
    for layer in range(LAYERS):
        q = query(len(step.rows), step.group1 - step.group0, dtype, seed=layer)
        states.append(peer.wait(peer.send(layer, 0, q)))
    assert all(state.o.dtype == dtype and state.lse.isfinite().all() for state in states)
    return [field.contiguous().view(torch.uint8).tolist() for state in states for field in state]


# -- states ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_states_equal_those_of_the_in_process_peer_bit_for_bit(shard, connect, dtype):
    model = model_of(dtype)
    layout = model.layouts[0]
    remote, local = connect(shard.address, model), InProcessPeer(SHARD, shard.store, model)
    a0 = sealed_span(remote.store, layout, "a", 0, 20)
    a1 = sealed_span(remote.store, layout, "a", 20, 57)
    b = sealed_span(remote.store, layout, "b", 0, 11)._replace(rows=range(1, 2))
    c = sealed_span(remote.store, layout, "c", 5, 40, 1, 3)
    both = range(0, 2)
    steps = [
        step_of([a0, a1, b], positions=(57, 11)),
        step_of([a0._replace(rows=both), b], positions=(60, 61), number=2),
        step_of([a1._replace(first=31, last=33)], number=3),
        step_of([c, b._replace(group0=1)], positions=(40, 11), number=4, group0=1),
        step_of([c._replace(group0=2)], number=5, group0=2),
    ]
    for step in steps:
        assert run_step(remote, step, dtype) == run_step(local, step, dtype)
    assert remote.identify().attended_bytes == local.identify().attended_bytes > 0


def test_frames_may_run_ahead_of_their_answers(shard, connect):
    peer = connect(shard.address)
    step = step_of([sealed_span(peer.store, LAYOUT, "a", 0, 20)])
    expected = run_step(peer, step)
    peer.begin(step)
    sent = [peer.send(layer, 0, query(1, 3, seed=layer)) for layer in range(LAYERS)]
    states = [peer.wait(it) for it in sent]
    assert [field.contiguous().view(torch.uint8).tolist() for s in states for field in s] == expected


def test_answers_of_a_step_given_up_half_way_are_never_seen(shard, connect):
    peer = connect(shard.address)
    read = sealed_span(peer.store, LAYOUT, "a", 0, 20)
    expected = run_step(peer, step_of([read]))
    peer.begin(step_of([read], number=2))
    peer.send(0, 0, query(1, 3, seed=9))
    assert run_step(peer, step_of([read], number=2)) == expected


def test_fanout_puts_the_states_of_two_servers_where_they_belong(start_shard, connect):
    shards = {WorkerId(name): start_shard(worker=WorkerId(name)) for name in ("x", "y")}
    remote = {w: connect(it.address) for w, it in shards.items()}
    local = {w: InProcessPeer(w, it.store, MODEL) for w, it in shards.items()}
    reads = {
        "y": (sealed_span(remote["y"].store, LAYOUT, "a", 0, 20),),
        "x": (sealed_span(remote["x"].store, LAYOUT, "a", 20, 40, 1, 3)._replace(rows=range(1, 2)),),
    }
    a = SequenceId("a")
    plan = StepPlan(1, 3, (a, a), (40, 41), {a: OWNER}, (reads,))
    over_grpc, in_process = Fanout(remote, MODEL), Fanout(local, MODEL)
    q = query(2, 3)
    for fanout in (over_grpc, in_process):
        fanout.begin(plan)
    for layer in range(LAYERS):
        got, expected = (f.wait(f.send(layer, 0, q)) for f in (over_grpc, in_process))
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine.o, theirs.o) and torch.equal(mine.lse, theirs.lse)
        assert got[1].lse[0].isneginf().all() and got[1].lse[1, :2].isneginf().all()


@pytest.mark.parametrize(
    ("step", "layer", "heads", "error"),
    [
        ([Read(SpanId("shard/99"), 0, 0, 5, 0, 3, range(1))], 0, 3, NotFound),
        ([Read(SpanId("shard/0"), 0, 0, 21, 0, 3, range(1))], 0, 3, InvalidRequest),
        ([Read(SpanId("shard/0"), 0, 0, 20, 0, 3, range(1))], LAYERS - 1, 2, InvalidRequest),
    ],
    ids=["an unknown span", "beyond the seal", "q of other heads"],
)
def test_a_step_refused_says_why_and_the_next_one_runs(shard, connect, step, layer, heads, error):
    peer = connect(shard.address)
    read = sealed_span(peer.store, LAYOUT, "a", 0, 20)
    peer.begin(step_of(step))
    with pytest.raises(error):
        peer.wait(peer.send(layer, 0, query(1, heads)))
    assert run_step(peer, step_of([read]))


# -- the store ---------------------------------------------------------------------------------------------


def test_a_span_makes_the_round_trip(shard, connect):
    store = connect(shard.address).store
    (k0, v0), (k1, v1) = tokens_of(LAYOUT, 20, seed=0), tokens_of(LAYOUT, 20, seed=1)
    span = store.create(key_of("a", first=7), capacity_tokens=20, layout=LAYOUT, epoch=OWNER)
    store.write(span, 0, 0, k0, v0, epoch=OWNER)
    store.write(span, 1, 0, k1[:, :12], v1[:, :12], epoch=OWNER)
    store.write(span, 1, 12, k1[:, 12:], v1[:, 12:], epoch=OWNER)
    digest = store.seal(span, 20, epoch=OWNER)
    assert digest == store.seal(span, 20, epoch=OWNER) == shard.store.seal(span, 20, epoch=OWNER)
    for layer, (k, v) in enumerate([(k0, v0), (k1, v1)]):
        got_k, got_v = store.read(span, layer, 3, 19)
        assert torch.equal(got_k, k[:, 3:19]) and torch.equal(got_v, v[:, 3:19])
    assert [part.shape[1] for part in store.read(span, 0, 5, 5)] == [0, 0]
    assert store.announce() == shard.store.announce()
    assert store.announce()[0].key == key_of("a", first=7)
    store.drop(span)
    assert shard.store.announce() == []


def test_a_span_larger_than_a_message_travels_in_chunks(start_shard, connect):
    shard = start_shard(memory_bytes=64 << 20)
    store = connect(shard.address).store
    count = 2 * max(READ_CHUNK_BYTES, WRITE_CHUNK_BYTES) // (LAYOUT.token_bytes // LAYERS) + 5
    span = store.create(key_of("a"), capacity_tokens=count, layout=LAYOUT, epoch=OWNER)
    k, v = tokens_of(LAYOUT, count)
    for layer in range(LAYERS):
        store.write(span, layer, 0, k, v, epoch=OWNER)
    store.seal(span, count, epoch=OWNER)
    got_k, got_v = store.read(span, 1, 0, count)
    assert torch.equal(got_k, k) and torch.equal(got_v, v)


def test_a_span_stays_readable_for_as_long_as_somebody_holds_it(shard, connect):
    store = connect(shard.address).store
    span = sealed_span(store, LAYOUT, "a", 0, 20).span
    for _ in range(2):
        store.hold(span)
    store.drop(span)
    store.drop_sequence(SequenceId("a"), epoch=OWNER)
    store.drop_sequence(SequenceId("a"), epoch=OWNER)
    assert store.read(span, 0, 0, 20)[0].shape[1] == 20
    store.drop(span)
    with pytest.raises(NotFound):
        store.read(span, 0, 0, 20)
    assert shard.store.announce() == []


def test_drop_sequence_and_fence_reach_the_store(shard, connect):
    store = connect(shard.address).store
    sealed_span(store, LAYOUT, "a", 0, 20)
    sealed_span(store, LAYOUT, "b", 0, 20)
    store.drop_sequence(SequenceId("a"), epoch=OLD)
    assert len(store.announce()) == 2
    store.drop_sequence(SequenceId("a"), epoch=OWNER)
    assert [info.key.sequence for info in store.announce()] == ["b"]
    store.fence(SequenceId("b"), NEW)
    with pytest.raises(Fenced):
        store.create(key_of("b", first=20), capacity_tokens=1, layout=LAYOUT, epoch=OWNER)


HALF = LAYOUT._replace(dtype=torch.float16)
TWO = LAYOUT.of_groups(2)
ELSE = SpanId("shard/99")
REFUSALS = {
    "full": (Full, lambda s, _: s.create(key_of("b"), capacity_tokens=1 << 20, layout=LAYOUT, epoch=OWNER)),
    "groups": (InvalidRequest, lambda s, _: s.create(key_of("b"), capacity_tokens=9, layout=TWO, epoch=NEW)),
    "gaps": (InvalidRequest, lambda s, span: s.seal(span, 25, epoch=OWNER)),
    "old seal": (Fenced, lambda s, span: s.seal(span, 20, epoch=OLD)),
    "old write": (Fenced, lambda s, span: s.write(span, 0, 20, *tokens_of(LAYOUT, 1), epoch=OLD)),
    "sealed": (InvalidRequest, lambda s, span: s.write(span, 0, 19, *tokens_of(LAYOUT, 1), epoch=OWNER)),
    "capacity": (InvalidRequest, lambda s, span: s.write(span, 0, 29, *tokens_of(LAYOUT, 2), epoch=OWNER)),
    "layer": (InvalidRequest, lambda s, span: s.write(span, 2, 20, *tokens_of(LAYOUT, 1), epoch=OWNER)),
    "heads": (InvalidRequest, lambda s, span: s.write(span, 0, 20, *tokens_of(TWO, 1), epoch=OWNER)),
    "dtype": (InvalidRequest, lambda s, span: s.write(span, 0, 20, *tokens_of(HALF, 1), epoch=OWNER)),
    "unsealed": (InvalidRequest, lambda s, span: s.read(span, 0, 0, 21)),
    "backwards": (InvalidRequest, lambda s, span: s.read(span, 0, 5, 4)),
    "read what": (NotFound, lambda s, _: s.read(ELSE, 0, 0, 1)),
    "write what": (NotFound, lambda s, _: s.write(ELSE, 0, 0, *tokens_of(LAYOUT, 1), epoch=OWNER)),
    "seal what": (NotFound, lambda s, _: s.seal(ELSE, 1, epoch=OWNER)),
    "hold what": (NotFound, lambda s, _: s.hold(ELSE)),
    "drop what": (NotFound, lambda s, _: s.drop(ELSE)),
}  # fmt: skip


@pytest.mark.parametrize(("error", "call"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_arrives_as_the_store_itself_would_raise_it(shard, connect, error, call):
    remote = connect(shard.address).store
    local = LocalStore(worker=SHARD, arena=Arena(8 << 20))
    refusals = []
    for store in (remote, local):
        span = store.create(key_of("a"), capacity_tokens=30, layout=LAYOUT, epoch=OWNER)
        for layer in range(LAYERS):
            store.write(span, layer, 0, *tokens_of(LAYOUT, 20), epoch=OWNER)
        store.seal(span, 20, epoch=OWNER)
        with pytest.raises(FarshoreError) as caught:
            call(store, span)
        refusals.append(caught.value)
    over_grpc, in_process = refusals
    assert type(over_grpc) is type(in_process) is error
    assert getattr(over_grpc, "free_bytes", None) == getattr(in_process, "free_bytes", None)
    if error is not NotFound:
        assert str(over_grpc) == str(in_process)


# -- what breaks -------------------------------------------------------------------------------------------


class Breaking(AttentionService):
    """A shard that does something to the call at chosen answers, before it gives them."""

    def __init__(self, worker, store):
        super().__init__(worker, store)
        self.answers = 0
        self.do = {}
        self.stream_ended = threading.Event()

    def Attend(self, frames, context):
        try:
            for state in super().Attend(frames, context):
                self.answers += 1
                self.do.get(self.answers, lambda _: None)(context)
                yield state
        finally:
            self.stream_ended.set()


def cancelled(context):
    context.cancel()


def late(context):
    context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "late")


@pytest.mark.parametrize("breaking", [cancelled, late])
def test_a_broken_stream_is_a_transport_error_and_the_step_can_run_again(start_shard, connect, breaking):
    shard = start_shard(service=Breaking)
    peer = connect(shard.address)
    step = step_of([sealed_span(peer.store, LAYOUT, "a", 0, 20)])
    expected = run_step(peer, step)
    shard.service.do[LAYERS + 2] = breaking
    peer.begin(step)
    peer.wait(peer.send(0, 0, query(1, 3)))
    sent = peer.send(1, 0, query(1, 3))
    with pytest.raises(TransportError):
        peer.wait(sent)
    with pytest.raises(TransportError, match="begin the step again"):
        peer.wait(sent)
    with pytest.raises(TransportError, match="begin the step again"):
        peer.send(1, 0, query(1, 3))
    assert run_step(peer, step) == expected


def test_a_late_cold_call_is_a_transport_error(start_shard, connect):
    class Late(AttentionService):
        def identity(self):
            raise DeadlineExceeded("late")

    peer = connect(start_shard(service=Late).address)
    with pytest.raises(TransportError, match="late"):
        peer.identify()


def test_a_peer_works_again_when_the_server_is_back_on_its_port(shard, connect):
    peer = connect(shard.address)
    step = step_of([sealed_span(peer.store, LAYOUT, "a", 0, 20)])
    expected = run_step(peer, step)
    peer.begin(step)
    peer.wait(peer.send(0, 0, query(1, 3)))
    shard.restart()
    with pytest.raises(TransportError, match=shard.address):
        peer.wait(peer.send(1, 0, query(1, 3)))
    assert run_step(peer, step) == expected
    assert peer.store.announce() == shard.store.announce()


def test_every_call_to_a_stopped_server_is_a_transport_error(shard, connect):
    peer = connect(shard.address)
    read = sealed_span(peer.store, LAYOUT, "a", 0, 20)
    shard.stop()
    calls = [
        lambda: run_step(peer, step_of([read])),
        peer.identify,
        peer.store.announce,
        lambda: peer.store.read(read.span, 0, 0, 20),
        lambda: peer.store.write(read.span, 0, 20, *tokens_of(LAYOUT, 1), epoch=OWNER),
        lambda: peer.store.seal(read.span, 20, epoch=OWNER),
        lambda: peer.store.drop_sequence(SequenceId("a"), epoch=OWNER),
    ]
    for call in calls:
        with pytest.raises(TransportError) as caught:
            call()
        assert caught.value.retryable and isinstance(caught.value.__cause__, grpc.RpcError)


def test_closing_a_peer_with_a_stream_open_leaves_no_thread_blocked(start_shard, connect):
    shard = start_shard(service=Breaking)
    before = set(threading.enumerate())
    peer = connect(shard.address)
    step = step_of([sealed_span(peer.store, LAYOUT, "a", 0, 20)])
    run_step(peer, step)
    peer.begin(step)
    peer.send(0, 0, query(1, 3))
    peer.close()
    assert shard.service.stream_ended.wait(DEADLINE_S), "the server still serves the stream"
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith(ATTENTION):  # the server's idle workers
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), thread.name


SHARD_PROCESS = """
from farshore.attention_offload.grpc_server import AttentionService, serve
from farshore.ids import WorkerId
from farshore.kvstore.arena import Arena
from farshore.kvstore.store import LocalStore

worker = WorkerId("shard")
server, address = serve(
    AttentionService(worker, LocalStore(worker=worker, arena=Arena(1 << 20))), "127.0.0.1:0"
)
print(address, flush=True)
server.wait_for_termination()
"""


@pytest.fixture
def shard_process():
    """(process, address) of a shard that can be frozen and killed."""
    command = [sys.executable, "-P", "-c", SHARD_PROCESS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process, process.stdout.readline().strip()
        process.kill()


def freeze(process):
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)


def test_a_frozen_shard_is_a_transport_error_at_the_deadline(shard_process, connect):
    process, address = shard_process
    peer = connect(address, frame_deadline_s=0.5)
    patient = connect(address)
    step = step_of([sealed_span(peer.store, LAYOUT, "a", 0, 20)])
    expected = run_step(patient, step)
    peer.begin(step)
    freeze(process)
    sent = peer.send(0, 0, query(1, 3))
    with pytest.raises(TransportError, match="no answer"):
        peer.wait(sent)
    process.send_signal(signal.SIGCONT)
    assert run_step(patient, step) == expected


def test_a_shard_killed_in_the_middle_of_a_step_is_a_transport_error(shard_process, connect):
    process, address = shard_process
    peer = connect(address)
    peer.begin(step_of([sealed_span(peer.store, LAYOUT, "a", 0, 20)]))
    peer.wait(peer.send(0, 0, query(1, 3)))
    freeze(process)
    sent = peer.send(1, 0, query(1, 3))
    process.kill()
    with pytest.raises(TransportError):
        peer.wait(sent)
    with pytest.raises(TransportError):
        peer.identify()


# -- the server --------------------------------------------------------------------------------------------


def test_health_and_reflection_answer(shard):
    with grpc.insecure_channel(shard.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", ATTENTION):
            reply = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=DEADLINE_S)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection.ServerReflectionInfo(iter([question]), timeout=DEADLINE_S)
        assert ATTENTION in {service.name for service in answer.list_services_response.service}


def test_a_taken_port_is_refused(shard):
    with pytest.raises(PortInUse, match="choose another port"):
        serve(shard.service, shard.address)


def test_a_peer_knows_who_answers(shard, connect):
    identity = connect(shard.address).identify()
    assert identity == InProcessPeer(SHARD, shard.store, MODEL).identify()
    assert identity.process_id == os.getpid()


# -- the engine --------------------------------------------------------------------------------------------

PROMPTS = {"a": list(range(5, 50)), "long": [n % 90 for n in range(250)]}
"""Behind the long one, the tail's first block is handed to the shards while decoding goes on."""
GREEDY = Sampling(max_tokens=20, temperature=0.0)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from farshore.models.source import resolve
    from farshore.models.weights import load_model

    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        vocab_size=97,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    return load_model(resolve(str(folder)), dtype=torch.float32)


class Counted:
    """A peer that counts its waits and its errors; ``before`` does something just before a chosen wait."""

    def __init__(self, peer, before=None):
        self._peer = peer
        self._before = before or {}
        self.waits = self.errors = 0

    def __getattr__(self, name):
        return getattr(self._peer, name)

    def wait(self, sent):
        self.waits += 1
        self._before.get(self.waits, lambda: None)()
        try:
            return self._peer.wait(sent)
        except TransportError:
            self.errors += 1
            raise


def generate(model, peers, shard_by):
    """The tokens of every prompt, batched in one engine. Keeps nothing."""
    engine_id = WorkerId("engine")
    arena = Arena(32 << 20)
    attention = attention_model(model.config, model.dtype)
    local = InProcessPeer(engine_id, LocalStore(worker=engine_id, arena=arena), attention)
    engine = Engine(
        model=model,
        attention=attention,
        arena=arena,
        peers={engine_id: local, **peers},
        targets=list(peers),
        shard_by=shard_by,
        claim=lambda _: OWNER,
    )
    events = {name: queue.SimpleQueue() for name in PROMPTS}
    for name, prompt in PROMPTS.items():
        engine.submit(SequenceId(name), prompt, GREEDY, events[name].put)
    engine.start()
    tokens = {name: [] for name in PROMPTS}
    for name, emitted in events.items():
        while not isinstance(event := emitted.get(timeout=DEADLINE_S), Finished):
            assert not hasattr(event, "error"), event
            if isinstance(event, Sampled):
                tokens[name].append(event.token_id)
    engine.stop()
    assert all(peer.identify().free_bytes == peer.identify().budget_bytes for peer in peers.values())
    return tokens


@pytest.fixture
def run_engine(tiny_model, start_shard, connect):
    """run(shard_by, before=...) -> tokens over gRPC, those over in-process peers, and the gRPC peers."""
    attention = attention_model(tiny_model.config, tiny_model.dtype)

    def run(shard_by, before=None):
        workers = [WorkerId("shard0"), WorkerId("shard1")]
        shards = {w: start_shard(worker=w, service=Breaking) for w in workers}
        local = {w: InProcessPeer(w, it.store, attention) for w, it in shards.items()}
        expected = generate(tiny_model, local, shard_by)
        remote = {
            w: Counted(connect(it.address, attention), before(it) if before else None)
            for w, it in shards.items()
        }
        return generate(tiny_model, remote, shard_by), expected, remote

    return run


@pytest.mark.parametrize("shard_by", ["range", "head"])
def test_an_engine_over_grpc_gives_the_tokens_of_one_in_process(run_engine, shard_by):
    tokens, expected, peers = run_engine(shard_by)
    assert tokens == expected
    assert all(len(it) == GREEDY.max_tokens for it in tokens.values())
    assert all(peer.waits and not peer.errors for peer in peers.values())


def test_a_server_restarted_in_the_middle_of_a_step_loses_nothing(run_engine):
    tokens, expected, peers = run_engine("range", lambda shard: {5: shard.restart, 40: shard.restart})
    assert tokens == expected
    assert all(peer.errors for peer in peers.values())


def test_a_call_cancelled_in_the_middle_of_a_step_loses_nothing(run_engine):
    at = iter([(4, 29), (11, 40)])

    def cancel_soon(shard):
        shard.service.do = dict.fromkeys(next(at), cancelled)
        return {}

    tokens, expected, peers = run_engine("range", cancel_soon)
    assert tokens == expected
    assert all(peer.errors for peer in peers.values())
