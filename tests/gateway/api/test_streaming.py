"""A request through the gateway when nothing fails."""

import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from farshore.proto import admin_pb2 as admin
from farshore.proto import inference_pb2 as api
from farshore.sampling import Sampling


def test_streams_tokens_as_they_come(farshore, served):
    ids = served.tokenizer.encode(" Paris is nice")
    call = farshore.generate("The capital")
    sequence = farshore.engine.next_sequence()
    assert list(sequence.request.prompt) == served.tokenizer.encode("The capital")
    accepted = next(call).accepted
    assert accepted.prompt_tokens == len(sequence.request.prompt)
    assert accepted.request_id and accepted.request_id != sequence.request.sequence_id
    sequence.prefill(1, 2)
    assert next(call).prefill == api.PrefillProgress(done_tokens=1, total_tokens=2)
    for index, token_id in enumerate(ids):
        sequence.tokens(token_id)
        token = next(call).token
        assert (token.index, token.token_id) == (index, token_id)
        assert token.text == served.tokenizer.decode([token_id])
    sequence.finish(api.FINISH_REASON_LENGTH)
    done = next(call).finished
    assert done.choices[0].reason == api.FINISH_REASON_LENGTH
    assert done.usage == api.Usage(
        prompt_tokens=accepted.prompt_tokens, completion_tokens=len(ids), cached_tokens=2
    )
    assert done.timings.queued_ms == 1.5
    assert 0 < done.timings.ttft_ms <= done.timings.total_ms
    assert [shard.process_id for shard in done.shards] == [7]
    assert list(call) == []


def test_defaults_reach_the_engine(farshore, served):
    farshore.engine.auto = ()
    list(farshore.generate())
    first = farshore.engine.next_sequence().request.sampling
    list(farshore.generate())
    second = farshore.engine.next_sequence().request.sampling
    assert Sampling.from_message(first) == Sampling(
        max_tokens=256, seed=first.seed, stop_token_ids=frozenset(served.stop_ids)
    )
    assert list(first.stop_token_ids) == list(served.stop_ids)
    assert first.seed != second.seed


def test_sampling_reaches_the_engine(farshore):
    farshore.engine.auto = ()
    sampling = dict(max_tokens=3, temperature=0.0, top_p=0.5, seed=2**64 - 1, ignore_eos=True)
    list(farshore.generate(sampling=sampling))
    sent = farshore.engine.next_sequence().request.sampling
    assert (sent.max_tokens, sent.temperature, sent.top_p, sent.seed) == (3, 0.0, 0.5, 2**64 - 1)
    assert list(sent.stop_token_ids) == []


def test_unset_max_tokens_is_what_positions_leave(farshore, served):
    farshore.engine.auto = ()
    tokens = api.TokenIds(ids=[5] * (served.config.max_positions - 9))
    list(farshore.generate(None, tokens=tokens))
    assert farshore.engine.next_sequence().request.sampling.max_tokens == 9


def test_chat_goes_through_the_template(farshore, encode_chat):
    farshore.engine.auto = ()
    messages = [dict(role="system", content="Be brief."), dict(role="user", content="Hi")]
    list(farshore.generate(None, chat=api.Chat(messages=[api.Message(**message) for message in messages])))
    assert list(farshore.engine.next_sequence().request.prompt) == encode_chat(messages)


@pytest.mark.parametrize("model", ["smollm2", ""])
def test_served_model_by_name(farshore, model):
    farshore.engine.auto = ()
    list(farshore.generate(model=model))


@pytest.mark.parametrize("cut", [0, 1])
def test_text_is_the_detokenised_answer(farshore, harness, served, cut):
    """Some characters consist of several tokens; with ``cut`` the answer ends within one."""
    ids = served.tokenizer.encode("naïve 🌍 東京 👩‍🚀 end 🦜")
    farshore.engine.auto = ids[: len(ids) - cut]
    events = list(farshore.generate())
    assert harness.text_of(events) == served.tokenizer.decode(farshore.engine.auto)
    assert any(event.token.text == "" for event in events if event.HasField("token"))


def test_stop_token_is_counted_but_no_text(farshore, harness, served):
    farshore.engine.auto = [*served.tokenizer.encode("Yes"), *served.config.eos_token_ids]
    events = list(farshore.generate())
    assert harness.text_of(events) == "Yes"
    assert events[-1].finished.usage.completion_tokens == len(farshore.engine.auto)


def test_status_is_the_controllers(farshore):
    farshore.engine.status.pool_free_bytes = 123
    assert (
        farshore.operators.ClusterStatus(admin.ClusterStatusRequest(), timeout=30) == farshore.engine.status
    )


def test_health(farshore):
    health = health_pb2_grpc.HealthStub(farshore.channel)
    for service in ("", "farshore.inference.v1.InferenceService"):
        reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection(farshore):
    stub = reflection_pb2_grpc.ServerReflectionStub(farshore.channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(
            file_containing_symbol="farshore.inference.v1.InferenceService"
        ),
    ]
    services, file = stub.ServerReflectionInfo(iter(asked), timeout=30)
    names = [service.name for service in services.list_services_response.service]
    assert "farshore.inference.v1.InferenceService" in names
    assert file.file_descriptor_response.file_descriptor_proto


def test_a_client_that_knows_nothing_but_reflection(farshore):
    """Lists the services, finds their descriptors, and makes calls by them alone."""
    farshore.engine.auto = (5, 6)
    found = ProtoReflectionDescriptorDatabase(farshore.channel)
    assert {"farshore.inference.v1.InferenceService", "farshore.admin.v1.AdminService"} <= set(
        found.get_services()
    )
    service = DescriptorPool(found).FindServiceByName("farshore.inference.v1.InferenceService")

    def call(name, **fields):
        method = service.methods_by_name[name]
        request, reply = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        kind = farshore.channel.unary_stream if method.server_streaming else farshore.channel.unary_unary
        coders = dict(request_serializer=request.SerializeToString, response_deserializer=reply.FromString)
        return kind(f"/{service.full_name}/{name}", **coders)(request(**fields), timeout=30)

    assert [model.name for model in call("ListModels").models] == ["smollm2"]
    events = list(call("Generate", text="Hello", sampling={"max_tokens": 2}))
    assert [event.WhichOneof("kind") for event in events] == ["accepted", "token", "token", "finished"]
