"""The engine's gRPC service passes the fields of a request on to the engine."""

from farshore import rpc
from farshore.proto import cluster_pb2 as pb
from farshore.proto import inference_pb2 as api
from farshore.workers.engine.constraints.grammar import GrammarCompiler
from farshore.workers.engine_service import EngineService


class Context:
    def add_callback(self, callback):
        return True

    def send_initial_metadata(self, metadata):
        self.initial_metadata = dict(metadata)


def test_a_request_with_another_salt_finds_no_stored_prefix(tiny_model, rig):
    cluster = rig(tiny_model, memory_bytes=64 << 20)
    engine = cluster.start()
    service = EngineService(
        worker="engine",
        engine=engine,
        store=cluster.stores["engine"],
        shards={worker: client.identify() for worker, client in cluster.clients.items()},
        grammars=GrammarCompiler(lambda: None, vocab=100, eos_ids=()),
    )
    new = []
    for name, salt in (("a", ""), ("b", "mine"), ("c", ""), ("d", "mine"), ("e", "another's")):
        request = pb.SequenceRequest(
            sequence_id=name,
            epoch=1,
            prompt=[i % 90 for i in range(700)],
            sampling=api.Sampling(max_tokens=2),
            cache_salt=salt,
        )
        before = written(cluster)
        context = Context()
        events = list(service.Generate(request, context))
        assert context.initial_metadata == {rpc.TAKEN: "1"}  # It waits in this engine, or runs.
        assert events[-1].HasField("finished")
        cluster.settle()
        new.append(written(cluster) - before)
    assert new == [700, 700, 0, 0, 700]


def written(cluster):
    """Returns the sealed tokens in all stores; full blocks stay cached after their sequences end."""
    return sum(info.sealed_tokens for store in cluster.stores.values() for info in store.announce())
