"""An engine over loopback connections: its tokens equal those in process, and a break loses nothing."""

import pytest

from farshore.attention_offload.fanout.native_fanout import NativeFanout
from farshore.attention_offload.transport.frames import REMOTE, Transport, native
from farshore.errors import TransportError
from farshore.sampling import Sampling
from farshore.workers.engine.kv import shard_queue
from farshore.workers.engine.sequence import Finished

PROMPTS = {"a": list(range(5, 50)), "long": [n % 90 for n in range(762)]}
"""The long prompt is on both shards, and its tail's first block is handed off during decoding."""
GREEDY = Sampling(max_tokens=20, temperature=0.0)


class Counted:
    """A shard client that counts its waits and errors.

    ``before`` maps the number of a wait to a function that is called just before the first wait for layer 0
    from that one on. A step is then under way: a break between two steps is no error.
    """

    def __init__(self, client, before):
        self._client = client
        self._before = sorted(before.items())
        self.waits = self.errors = 0

    def __getattr__(self, name):
        return getattr(self._client, name)

    def begin(self, step, **options):
        """Connects if there is no connection, as the engine does outside its loop."""

        def connected():
            self._client.connect()
            self._client.begin(step, **options)

        self._counted(connected)

    def send(self, layer, micro_batch, q):
        return self._counted(lambda: self._client.send(layer, micro_batch, q))

    def wait(self, sent, **options):
        self.count_wait(sent.layer)
        return self._counted(lambda: self._client.wait(sent, **options))

    def count_wait(self, layer):
        self.waits += 1
        if self._before and self.waits >= self._before[0][0] and layer == 0:
            self._before.pop(0)[1]()

    def break_off(self):
        """Called by the native fan-out, which waits for several clients at once."""
        self.errors += 1
        self._client.break_off()

    def _counted(self, call):
        try:
            return call()
        except TransportError:
            self.errors += 1
            raise


@pytest.fixture
def count_fanout_waits(monkeypatch):
    """count_fanout_waits(clients) counts a wait for each client when one native call waits for several."""
    wait = NativeFanout.wait

    def count(clients):
        def counted(fanout, step, layer, *how):
            streams = [request.connection for request in fanout.requests]
            for client in clients:
                if client.native_connection in streams:
                    client.count_wait(layer)
            return wait(fanout, step, layer, *how)

        monkeypatch.setattr(NativeFanout, "wait", counted)

    return count


@pytest.fixture
def run_engine(tiny_model, serve_store, connect, rig, submit, breaking_service, count_fanout_waits):
    """run(transport, shard_by, before=...) -> (its tokens, tokens with in-process shards, its clients)."""

    def generate(cluster):
        """Returns the tokens of every prompt, from one engine that is then stopped."""
        engine = cluster.engine()
        collected = {name: submit(engine, name, prompt, GREEDY) for name, prompt in PROMPTS.items()}
        engine.start()
        for answer in collected.values():
            result = answer.result()
            assert isinstance(result, Finished), result
        engine.stop()
        identities = [cluster.clients[worker].identify() for worker in cluster.targets]
        assert all(identity.free_bytes == identity.budget_bytes for identity in identities)
        return {name: answer.tokens for name, answer in collected.items()}

    def run(transport, shard_by, before=lambda _: {}):
        expected = generate(rig(tiny_model, shard_by=shard_by, memory_bytes=32 << 20))
        cluster = rig(tiny_model, shard_by=shard_by, memory_bytes=32 << 20)
        for worker in cluster.targets:
            shard = serve_store(cluster.stores[worker], worker, service=breaking_service)
            client = connect(shard.address, model=cluster.attention, transports=[transport])
            cluster.clients[worker] = Counted(client, before(shard))
        clients = [cluster.clients[worker] for worker in cluster.targets]
        count_fanout_waits(clients)
        return generate(cluster), expected, clients

    return run


needs_native = pytest.mark.skipif(native() is None, reason="built without a C++ compiler: gRPC serves")
over_every_transport = pytest.mark.parametrize(
    "transport",
    [
        pytest.param(transport, marks=() if transport is Transport.GRPC else needs_native)
        for transport in REMOTE
    ],
)


@over_every_transport
@pytest.mark.parametrize("shard_by", ["range", "head"])
def test_an_engine_over_a_transport_gives_the_tokens_of_one_in_process(run_engine, transport, shard_by):
    tokens, expected, clients = run_engine(transport, shard_by)
    assert tokens == expected
    assert all(len(answer) == GREEDY.max_tokens for answer in tokens.values())
    assert all(client.waits and not client.errors for client in clients)
    assert {client.transport for client in clients} == {transport}


@over_every_transport
def test_a_server_restarted_in_the_middle_of_a_step_loses_nothing(run_engine, transport, monkeypatch):
    """Each shard breaks in another step: a break ends the step before a second one could be noticed. A
    shard counts as gone only after longer than a slow machine takes to listen again."""
    monkeypatch.setattr(shard_queue, "REFUSED_S", 60.0)
    wait_numbers = iter([(5, 40), (17, 52)])
    tokens, expected, clients = run_engine(
        transport, "range", lambda shard: dict.fromkeys(next(wait_numbers), shard.restart)
    )
    assert tokens == expected
    assert all(client.errors for client in clients)


def test_a_call_cancelled_in_the_middle_of_a_step_loses_nothing(run_engine):
    wait_numbers = iter([(4, 29), (11, 40)])

    def cancel_soon(shard):
        shard.service.do = dict.fromkeys(next(wait_numbers), lambda context: context.cancel())
        return {}

    tokens, expected, clients = run_engine(Transport.GRPC, "range", cancel_soon)
    assert tokens == expected
    assert all(client.errors for client in clients)
