"""What a gateway makes of the options of its model: names, limits, template and tokenizer."""

import json
from dataclasses import replace

import grpc
import pytest

from farshore.errors import InvalidRequest, ModelError
from farshore.gateway.served import Served
from farshore.model_spec import ModelSpec
from farshore.models.config.generation import GenerationDefaults
from farshore.proto import inference_pb2 as api

CHAT = api.Chat(messages=[api.Message(role="user", content="Hi")])


@pytest.fixture
def gateway(harness, loop_thread, served):
    """gateway(ModelSpec field=…) -> a Harness of a gateway with these options, over the demo model."""
    with_options = []

    def start(**options):
        changed = Served.load(ModelSpec(**options))
        running = harness.gateway(loop_thread, changed)
        with_options.append(running)
        return running.__enter__()

    yield start
    for running in with_options:
        running.__exit__(None, None, None)


def refusal(harness, call):
    failure = harness.failure_of(call)
    assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT and "\n" not in failure.details()
    return failure.details()


def test_every_name_is_accepted_and_no_other(gateway, harness):
    running = gateway(served_names=("one", "two"))
    running.engine.auto = [5]
    for name in ("", "one", "two"):
        assert list(running.generate(model=name))
    for name in ("smollm2", "three"):
        assert "this gateway serves 'one' and 'two'" in refusal(harness, running.generate(model=name))


def test_a_shorter_model_length_limits_requests_and_names_its_option(gateway, harness):
    running = gateway(max_model_len=50)
    running.engine.auto = [5]
    tokens = api.TokenIds(ids=[5] * 40)
    assert list(running.generate(text=None, tokens=tokens, sampling={"max_tokens": 10}))
    text = refusal(harness, running.generate(text=None, tokens=tokens, sampling={"max_tokens": 11}))
    assert "50 positions (--max-model-len): ask for at most 10 tokens" in text
    text = refusal(harness, running.generate("word " * 50))
    assert "50 positions (--max-model-len): shorten" in text
    text = refusal(harness, running.generate(text=None, tokens=api.TokenIds(ids=[5] * 50)))
    assert "50 positions: shorten" in text
    text = refusal(harness, running.generate(text="x" * (50 * 256 + 1)))
    assert "50 positions (--max-model-len) takes" in text


def test_a_longer_model_length_needs_scaling():
    with pytest.raises(ModelError, match=r"--max-model-len 10000 .*8192 positions.*--rope-scaling"):
        Served.load(ModelSpec(max_model_len=10_000))
    scaling = {"rope_type": "linear", "factor": 2.0}
    config = Served.load(ModelSpec(max_model_len=10_000, rope_scaling=scaling)).config
    assert (config.max_positions, config.rope.kind, config.rope.factor) == (10_000, "linear", 2.0)


def test_another_chat_template_makes_the_prompt(gateway, tmp_path, served):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}")
    running = gateway(chat_template=str(template))
    running.engine.auto = [5]
    assert list(running.generate(text=None, chat=CHAT))
    prompt = list(running.engine.next_sequence().request.prompt)
    assert prompt == served.tokenizer.encode("[user: Hi]", add_special_tokens=False)


def test_a_chat_template_that_is_none(tmp_path):
    (tmp_path / "bad.jinja").write_text("{% for %}")
    served = Served.load(ModelSpec(chat_template=str(tmp_path / "bad.jinja")))
    with pytest.raises(ModelError, match=r"--chat-template .*bad\.jinja"):
        served.chat.await_compiled()
    served.chat.close()
    with pytest.raises(InvalidRequest, match=r"--chat-template .*No such file"):
        Served.load(ModelSpec(chat_template=str(tmp_path / "none.jinja")))


def test_another_tokenizer(tmp_path):
    """For a model that has none."""
    config = {
        "model_type": "llama",
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "vocab_size": 49152,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"not read here")
    with pytest.raises(ModelError, match="tokenizer"):
        Served.load(ModelSpec(model=str(tmp_path)))
    served = Served.load(ModelSpec(model=str(tmp_path), tokenizer="smollm2"))
    assert (
        served.config.max_positions == 64 and served.tokenizer.decode(served.tokenizer.encode("Hi")) == "Hi"
    )


def test_recommended_sampling(tmp_path):
    (tmp_path / "mine.json").write_text('{"temperature": 0.5}')
    served = Served.load(ModelSpec(generation_config=str(tmp_path / "mine.json")))
    served.chat.close()
    assert served.generation == GenerationDefaults(temperature=0.5)
    (tmp_path / "mine.json").write_text('{"temperature": "warm"}')
    with pytest.raises(ModelError, match=r"mine\.json: temperature must be .* not 'warm'"):
        Served.load(ModelSpec(generation_config=str(tmp_path / "mine.json")))


@pytest.mark.parametrize(("config_ids", "expected"), [((5, 7), (5, 7)), ((), (2,))])
def test_end_tokens_of_the_configuration_win(served, config_ids, expected):
    """transformers' generate knows no others; the tokenizer's are for models whose configuration has none."""
    assert served.tokenizer.eos_ids[:1] == (2,)
    changed = replace(served, config=replace(served.config, eos_token_ids=config_ids))
    assert changed.stop_ids[: len(expected)] == expected
    assert config_ids == () or changed.stop_ids == config_ids
