"""An option that a request leaves unset gets the model's value: over gRPC, HTTP and the command line."""

import json
from dataclasses import replace

import httpx2
import openai
import pytest

from farshore.model_spec import ModelSpec
from farshore.models.config.generation import GenerationDefaults, load_generation
from farshore.models.files.source import resolve
from farshore.proto import inference_pb2 as api

RECOMMENDED = {
    "temperature": 0.5,
    "top_k": 20,
    "top_p": 0.75,
    "min_p": 0.25,
    "repetition_penalty": 1.25,
    "max_new_tokens": 99,
}
NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens")
NEUTRAL = (0.0, 0, 1.0, 0.0, 1.0, 256)


@pytest.fixture
def running(harness, loop_thread, served, tmp_path):
    """running(recommended) -> a Harness with an HTTP listener, of a gateway whose model recommends this."""
    with harness.contextlib.ExitStack() as stack:

        def start(recommended=None):
            file = tmp_path / "generation_config.json"
            file.write_text(json.dumps(recommended or RECOMMENDED))
            spec = ModelSpec(generation_config=str(tmp_path))
            generation = load_generation(spec, resolve(spec.model), vocab=served.config.vocab)
            changed = replace(served, generation=generation)
            gateway = stack.enter_context(harness.gateway(loop_thread, changed, http="127.0.0.1:0"))
            gateway.engine.auto = [5]
            return gateway

        yield start


def sent(gateway):
    sampling = gateway.engine.next_sequence().request.sampling
    return tuple(getattr(sampling, name) for name in NAMES)


def openai_of(gateway):
    return openai.OpenAI(
        base_url=f"http://{gateway.gateway.http_address}/v1", api_key="none", max_retries=0, timeout=30
    )


def test_unset_options_are_the_models_and_given_ones_the_requests(running):
    gateway = running()
    list(gateway.generate())
    assert sent(gateway) == (0.5, 20, 0.75, 0.25, 1.25, 99)
    zeros = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "max_tokens": 500}
    list(gateway.generate(sampling=zeros))
    assert sent(gateway) == (0.0, 0, 1.0, 0.0, 1.0, 500)


def test_http_has_the_same_defaults(running):
    gateway = running()
    with openai_of(gateway) as client:
        chat = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}]}
        client.chat.completions.create(**chat)
        assert sent(gateway) == (0.5, 20, 0.75, 0.25, 1.25, 99)
        client.chat.completions.create(**chat, temperature=0, top_p=1, max_tokens=7, extra_body={"top_k": -1})
        assert sent(gateway) == (0.0, 0, 1.0, 0.25, 1.25, 7)
        client.completions.create(model="smollm2", prompt="Hi")
        assert sent(gateway) == (0.5, 20, 0.75, 0.25, 1.25, 16)


def test_a_model_that_names_nothing_leaves_the_faces_own_defaults(start):
    gateway = start(http="127.0.0.1:0")
    gateway.engine.auto = [5]
    list(gateway.generate())
    assert sent(gateway) == NEUTRAL
    with openai_of(gateway) as client:
        client.completions.create(model="smollm2", prompt="Hi")
    assert sent(gateway) == (1.0, *NEUTRAL[1:5], 16)


def test_a_part_of_the_options(running):
    gateway = running({"top_p": 0.5})
    list(gateway.generate())
    assert sent(gateway) == (0.0, 0, 0.5, 0.0, 1.0, 256)


def test_more_tokens_than_the_model_has_positions_are_lowered(running):
    gateway = running({"max_new_tokens": 1 << 20})
    list(gateway.generate(text=None, tokens=api.TokenIds(ids=[5] * 92)))
    assert sent(gateway)[-1] == 8192 - 92
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    answer = httpx2.post(f"http://{gateway.gateway.http_address}/v1/chat/completions", json=chat)
    assert answer.status_code == 200, answer.text


def test_several_choices_need_no_temperature_where_the_model_names_one(running, farshore, harness):
    gateway = running({"temperature": 0.5})
    call = gateway.generate(sampling={"n": 2})
    sequence = gateway.engine.next_sequence()
    sequence.finish(choice=1)
    list(call)
    assert "set a temperature" in harness.failure_of(farshore.generate(sampling={"n": 2})).details()


def test_a_resumed_request_is_the_same_request(running):
    """The model's values are no part of what identifies a request."""
    gateway = running()
    first = list(gateway.generate(request_id="a"))
    assert list(gateway.generate(request_id="a")) == first
    assert sent(gateway)[0] == 0.5 and gateway.engine.idle


def test_get_model_shows_the_defaults_in_effect(running, farshore):
    shown = running().stub.GetModel(api.GetModelRequest(name="smollm2")).sampling_defaults
    assert tuple(getattr(shown, name) for name in NAMES) == (0.5, 20, 0.75, 0.25, 1.25, 99)
    shown = farshore.stub.GetModel(api.GetModelRequest(name="smollm2")).sampling_defaults
    assert tuple(getattr(shown, name) for name in NAMES) == NEUTRAL
    assert all(shown.HasField(name) for name in NAMES)


def test_end_tokens_of_a_file_that_the_operator_names(running, served):
    gateway = running({"eos_token_id": [7, 9]})
    list(gateway.generate())
    assert list(gateway.engine.next_sequence().request.sampling.stop_token_ids) == [7, 9]
    list(running().generate())
    kept = replace(served, generation=GenerationDefaults(temperature=1.0))
    assert kept.stop_ids == served.stop_ids != ()
