"""Gateways in front of a real engine with the demo model: what a fake engine cannot show."""

import grpc
import pytest

from farshore.ids import WorkerId
from farshore.kvstore.directory.embedded import EmbeddedDirectory
from farshore.model_spec import ModelSpec
from farshore.proto import inference_pb2 as api
from farshore.workers.dense import DenseConfig, DenseWorker
from farshore.workers.engine.admission import EngineLimits


@pytest.fixture
def engine(demo_source):
    """A dense worker in this process that keeps KV in its own memory: its address."""
    config = DenseConfig(
        token=None,
        worker=WorkerId("dense-0-a"),
        slot="dense-0",
        spec=ModelSpec(),
        dtype="bfloat16",
        kv_format="bf16",
        kv_memory_bytes=64 << 20,
        offload=False,
        shard_by="range",
        listen="127.0.0.1:0",
        threads=1,
        limits=EngineLimits(),
    )
    worker = DenseWorker(config, EmbeddedDirectory(), host="127.0.0.1")
    worker.load()
    yield worker.serve()
    worker.stop()


def _tokens(events, choices):
    """The ids of each choice, by its index."""
    found = [[] for _ in range(choices)]
    for event in events:
        if event.HasField("token"):
            found[event.token.choice].append(event.token.token_id)
    return found


@pytest.mark.heavy
def test_a_drawn_answer_goes_on_at_another_gateway(start, engine):
    """The engine draws the same tokens again, from the seed that the first gateway chose, also in a batch."""
    one, other = start(engine_address=engine), start(engine_address=engine)
    request = api.GenerateRequest(text="Once", sampling=api.Sampling(temperature=1.0, max_tokens=24, n=2))
    accepted, *events = one.stub.Generate(request, timeout=120)
    answer = _tokens(events, 2)
    assert answer[0] != answer[1]
    received = [answer[0][:5], answer[1][:1]]
    request.resume.received.extend(api.TokenIds(ids=ids) for ids in received)
    request.resume.seed = seed = accepted.accepted.seed
    rest = _tokens(other.stub.Generate(request, timeout=120), 2)
    assert [had + new for had, new in zip(received, rest, strict=True)] == answer

    request.ClearField("resume")
    request.sampling.seed = seed
    batch = api.BatchGenerateRequest(requests=[request, api.GenerateRequest()])
    whole, refused = other.stub.BatchGenerate(batch, timeout=120).results
    assert [list(choice.token_ids) for choice in whole.answer.choices] == answer
    assert refused.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
