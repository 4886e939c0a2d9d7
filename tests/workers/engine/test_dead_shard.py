"""A shard that a test declares dead fails every call: MortalClient, and frozen or killed processes."""

from pathlib import Path

import pytest
import torch

from farshore.attention_offload.plan.step_plan import Read, ShardStep
from farshore.errors import Late, Lost, TransportError
from farshore.ids import Epoch, SequenceId, SpanId
from farshore.kernels.base import KVLayout
from farshore.kernels.formats import KVFormat
from farshore.kvstore.base import ShardStore, SpanKey

EPOCH = Epoch(1)
LAYOUT = KVLayout(3, 3, 1, 1, 8, 8, KVFormat.FLOAT32)
"""The layout of the tiny model."""
A = SequenceId("a")
STORE_CALLS = sorted(
    name
    for name, value in vars(ShardStore).items()
    if callable(value) and not name.startswith("_") and name != "check_integrity"
)
CLIENT_CALLS = ["identify", "begin", "send", "wait"]


@pytest.fixture
def shard(tiny_model, rig, mortal):
    cluster = rig(tiny_model, shards=1, memory_bytes=8 << 20)
    client = mortal(cluster.clients["shard0"])
    yield client
    client.revive()
    client.store.drop_sequence(A, epoch=EPOCH)


def placed(client):
    """A sealed span of 4 tokens."""
    key = SpanKey(sequence=A, layer_class=0, first=0, group0=0, group1=LAYOUT.groups)
    span = client.store.create(key, capacity_tokens=4, layout=LAYOUT, epoch=EPOCH)
    k = torch.ones(LAYOUT.k_heads, 4, LAYOUT.k_dim)
    for layer in range(LAYOUT.layers):
        client.store.write(span, layer, 0, k, k, sequence=A, epoch=EPOCH)
    client.store.seal(span, 4, sequence=A, epoch=EPOCH)
    return span


def step_of(span):
    read = Read(SpanId(span), 0, 0, 4, 0, LAYOUT.groups, range(1), A)
    return ShardStep(1, (0,), (9,), 0, LAYOUT.groups, ((read,),), (range(1),))


def attend(client, span):
    client.connect()
    client.begin(step_of(span))
    return client.wait(client.send(0, 0, torch.ones(1, 6, 8)))


def test_a_living_shard_behaves_as_the_wrapped_client(shard):
    span = placed(shard)
    state = attend(shard, span)
    assert torch.allclose(state.o, torch.ones(1, 6, 8))
    assert shard.identify().worker == "shard0" and not shard.dead
    assert shard.store.memory.dtype == torch.uint8, "attributes that are not methods pass through"
    assert shard.calls["create"] == shard.calls["seal"] == shard.calls["wait"] == 1


@pytest.mark.parametrize("name", [*CLIENT_CALLS, *STORE_CALLS])
def test_a_dead_shard_fails_every_call(shard, name):
    span = placed(shard)
    second_connection = shard.second_connection()
    assert second_connection is shard.second_connection()
    shard.die()
    for client in (shard, second_connection):
        with pytest.raises(TransportError, match="the shard is dead"):
            getattr(client if name in CLIENT_CALLS else client.store, name)()
    shard.break_off()
    shard.revive()
    attend(shard, span)
    attend(second_connection, span)


def test_spans_that_could_not_be_dropped_are_there_after_revive(shard):
    span = placed(shard)
    shard.die()
    with pytest.raises(TransportError):
        shard.store.drop_sequence(A, epoch=EPOCH)
    shard.revive()
    assert [info.span for info in shard.store.announce()] == [span]


def test_a_shard_dies_at_a_chosen_call(shard):
    span = placed(shard)
    shard.before("wait", 2, shard.die)
    attend(shard, span)
    with pytest.raises(TransportError):
        attend(shard, span)
    assert shard.dead
    with pytest.raises(TransportError):
        shard.identify()


def test_a_single_call_fails_with_the_chosen_error(shard):
    span = placed(shard)

    def late():
        raise Late("no answer yet", shards=["shard0"])

    shard.before("send", 1, late)
    with pytest.raises(Late):
        attend(shard, span)
    attend(shard, span)
    shard.die(lambda: Lost("another incarnation", shards=["shard0"]))
    with pytest.raises(Lost):
        attend(shard, span)


def test_a_process_is_frozen_thawed_and_killed(start_process, connect, tiny_model, rig):
    shard = start_process(worker="shard7")
    client = connect(shard.address, model=rig(tiny_model).attention)
    span = placed(client)
    state = Path(f"/proc/{shard.process.pid}/stat")
    shard.freeze()
    assert state.read_text().rpartition(")")[2].split()[0] == "T"
    shard.thaw()
    assert client.identify().worker == "shard7"
    assert torch.allclose(attend(client, span).o, torch.ones(1, 6, 8))
    shard.freeze()
    shard.kill()  # It is frozen.
    assert not state.exists()
    with pytest.raises(TransportError):
        client.identify()
    with pytest.raises(TransportError):
        client.store.announce()
