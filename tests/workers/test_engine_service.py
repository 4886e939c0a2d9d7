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


def served(cluster):
    """A service over a new engine of the cluster, and the engine."""
    engine = cluster.start()
    service = EngineService(
        worker="engine",
        engine=engine,
        store=cluster.stores["engine"],
        shards={worker: client.identify() for worker, client in cluster.clients.items()},
        grammars=GrammarCompiler(lambda: None, vocab=100, eos_ids=()),
    )
    return service, engine


def generate(service, name, *, max_tokens, salt="", context=None):
    request = pb.SequenceRequest(
        sequence_id=name,
        epoch=1,
        prompt=[i % 90 for i in range(700)],
        sampling=api.Sampling(max_tokens=max_tokens, temperature=0),
        cache_salt=salt,
    )
    return service.Generate(request, context or Context())


def test_log_probabilities_of_the_prompt_are_sent_in_pieces(tiny_model, rig):
    service, _ = served(rig(tiny_model, memory_bytes=64 << 20))
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
    service, _ = served(cluster)
    new = []
    for name, salt in (("a", ""), ("b", "mine"), ("c", ""), ("d", "mine"), ("e", "another's")):
        before = written(cluster)
        context = Context()
        events = list(generate(service, name, max_tokens=2, salt=salt, context=context))
        assert context.initial_metadata == {rpc.TAKEN: "1"}  # It waits in this engine, or runs.
        assert events[-1].HasField("finished")
        cluster.settle()
        new.append(written(cluster) - before)
    assert new == [700, 700, 0, 0, 700]


def written(cluster):
    """Returns the sealed tokens in all stores; full blocks stay cached after their sequences end."""
    return sum(info.sealed_tokens for store in cluster.stores.values() for info in store.announce())


def test_the_status_shows_the_spans_that_a_sequence_reads_whichever_sequence_wrote_them(tiny_model, rig):
    cluster = rig(tiny_model, memory_bytes=64 << 20)
    service, engine = served(cluster)
    streams = [generate(service, name, max_tokens=1300) for name in "ab"]
    for stream in streams:
        assert next(event for event in stream if event.HasField("token"))
    (first, second) = service.Status(pb.EngineStatusRequest(), None).sequences
    for name in "ab":
        engine.cancel(name)
    assert all(list(stream)[-1].HasField("finished") for stream in streams)
    assert written(cluster) == 700 + 700 % 256, "b shares no full blocks of a"
    token_bytes = cluster.attention.layouts[0].token_bytes
    for sequence in (first, second):
        spans = sorted(sequence.spans, key=lambda span: span.first)
        assert [span.first for span in spans] == [0, *(span.last for span in spans[:-1])]
        assert spans[-1].last == sequence.tail_first >= 512
        assert {span.worker_id for span in spans} <= set(cluster.targets)
        assert sum(span.bytes for span in spans) == sequence.tail_first * token_bytes
