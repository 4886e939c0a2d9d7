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


def service_of(cluster):
    return EngineService(
        worker="engine",
        engine=cluster.start(),
        store=cluster.stores["engine"],
        shards={worker: client.identify() for worker, client in cluster.clients.items()},
        grammars=GrammarCompiler(lambda: None, vocab=100, eos_ids=()),
    )


def test_log_probabilities_of_the_prompt_are_sent_in_pieces(tiny_model, rig):
    service = service_of(rig(tiny_model, memory_bytes=64 << 20))
    prompt = [i % 90 for i in range(600)]
    request = pb.SequenceRequest(
        sequence_id="a", epoch=1, prompt=prompt, sampling=api.Sampling(max_tokens=1, prompt_logprobs=2)
    )
    scored = [
        event.prompt_logprobs
        for event in service.Generate(request, Context())
        if event.HasField("prompt_logprobs")
    ]
    assert [part.first for part in scored] == [0, 256, 512]
    tokens = [token for part in scored for token in part.tokens]
    assert [token.token_id for token in tokens] == prompt
    assert not tokens[0].HasField("logprob") and tokens[0].rank == 0 and not tokens[0].top
    for token in tokens[1:]:
        assert token.logprob < 0 and token.rank >= 1 and len(token.top) == 2


def test_a_request_with_another_salt_finds_no_stored_prefix(tiny_model, rig):
    cluster = rig(tiny_model, memory_bytes=64 << 20)
    service = service_of(cluster)
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
