"""Model shapes from config.json equal transformers', and configurations that are refused."""

import json

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from farshore.errors import ModelError
from farshore.models.config.hf import from_hf
from farshore.models.config.load import load_config
from farshore.models.files.source import ModelSource
from farshore.models.weights.names import expected_shapes, hf_name


@pytest.fixture(scope="session")
def parsed(base):
    return lambda generation=None, **changes: from_hf(base | changes, generation, "m")


def test_defaults(parsed):
    config = parsed()
    assert (config.head_dim, config.group, config.eos_token_ids) == (16, 2, ())
    assert (config.tied_embeddings, config.biases) == (False, ())
    assert parsed(hidden_act="swish").layers == 2


@pytest.fixture(scope="session")
def their_shapes(their_config):
    """their_shapes(config.json's object) -> the shapes of transformers' parameters, by name."""
    from transformers import LlamaForCausalLM, MistralForCausalLM

    def shapes(config):
        family = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM}[config["model_type"]]
        with torch.device("meta"):
            model = family(their_config(config))
        found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        return found, model.config

    return shapes


def absent_or(*values):
    return st.sampled_from(["absent", *values])


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    family=st.sampled_from(["llama", "mistral"]),
    keys=st.fixed_dictionaries(
        {
            "hidden_size": st.sampled_from([32, 64]),
            "num_attention_heads": st.sampled_from([4, 8, 16]),
            "num_key_value_heads": absent_or(None, 1, 2, 4, 8),
            "head_dim": absent_or(None, 4, 16),
            "attention_bias": absent_or(True, False),
            "mlp_bias": absent_or(True, False),
            "tie_word_embeddings": absent_or(True, False),
            "rms_norm_eps": absent_or(1e-5, 1e-6),
            "vocab_size": st.sampled_from([100, 128]),
            "pretraining_tp": absent_or(1, 2),
            "attn_logit_softcapping": absent_or(None, 30.0),
        }
    ),
)
def test_shapes_are_transformers(base, their_shapes, family, keys):
    # transformers 5 refuses null for a Mistral's KV heads; earlier versions took it for num_attention_heads.
    assume(family == "llama" or keys["num_key_value_heads"] is not None)
    config = {k: v for k, v in (base | keys).items() if v != "absent"} | {"model_type": family}
    try:
        ours = from_hf(config, None, "m")
    except ModelError:
        heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
        # A Mistral without the key has 8 KV heads.
        assert heads % (kv_heads or (8 if "num_key_value_heads" not in config else heads))
        return
    found, theirs = their_shapes(config)
    assert {hf_name(name): shape for name, shape in expected_shapes(ours).items()} == found
    assert (ours.rms_eps, ours.tied_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)


ABSENT = "absent"
GENERATIONS = [ABSENT, {}, {"eos_token_id": None}, {"eos_token_id": 7}, {"eos_token_id": [7, 8, 7]}]


@pytest.mark.parametrize("ours", [ABSENT, None, 5, [5, 6], [], -1, [7, 97]], ids=str)
def test_end_tokens_are_those_of_generate(tiny, ours):
    """generation_config.json replaces config.json's, also by none. Ids outside the vocabulary can't be
    sampled."""
    from transformers import LlamaForCausalLM

    _, folder = tiny()
    file, generation_file = folder / "config.json", folder / "generation_config.json"
    config = json.loads(file.read_text()) | {"eos_token_id": ours}
    file.write_text(json.dumps({key: value for key, value in config.items() if value != ABSENT}))
    for generation in GENERATIONS:
        generation_file.unlink(missing_ok=True)
        if generation != ABSENT:
            generation_file.write_text(json.dumps(generation))
        theirs = LlamaForCausalLM.from_pretrained(folder).generation_config.eos_token_id
        theirs = theirs if isinstance(theirs, list) else [theirs]
        expected = {token for token in theirs if token is not None and 0 <= token < config["vocab_size"]}
        got = load_config(ModelSource("m", folder, "hf")).eos_token_ids
        assert set(got) == expected and len(got) == len(expected), generation


@pytest.mark.parametrize("token", ["2", 2.0, True, [[1]], {"id": 2}, [None]])
def test_end_tokens_that_are_no_numbers(parsed, token):
    for arguments in (dict(eos_token_id=token), dict(generation={"eos_token_id": token})):
        with pytest.raises(ModelError, match="eos_token_id must be a token id"):
            parsed(**arguments)


@pytest.mark.parametrize("bos", [None, -1, 100, 10**9, [1]])
def test_an_unused_begin_token_refuses_nothing(parsed, bos):
    assert parsed(bos_token_id=bos, pad_token_id=bos).layers == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="gpt_neox"), "supported: model_type 'llama' and 'mistral'"),
        (dict(model_type=None), "supported"),
        (dict(hidden_act="gelu"), "silu"),
        (dict(hidden_act=None), "silu"),
        (dict(quantization_config={"quant_method": "gptq"}), r"\(gptq\) are unsupported.*GGUF"),
        (dict(compression_config={"format": "pack"}), "quantised safetensors"),
        (dict(per_layer_config={"0": {"intermediate_size": 8}}), "per_layer_config"),
        (dict(kv_sharing_modes=["reuse", None]), "kv_sharing_modes"),
        (dict(text_config={"model_type": "llama"}), "text_config"),
        (dict(is_causal=False), "no causal decoder"),
        (dict(is_encoder_decoder=True), "no causal decoder"),
        (dict(max_position_embeddings=0), "max_position_embeddings"),
        (dict(max_position_embeddings=128.0), "max_position_embeddings"),
        (dict(num_hidden_layers=0), "layers"),
        (dict(num_hidden_layers=True), "layers"),
        (dict(vocab_size="many"), "vocab"),
        (dict(hidden_size=None), "hidden"),
        (dict(num_attention_heads=0), "heads"),
        (dict(num_key_value_heads=3), "evenly"),
        (dict(head_dim=7), "even"),
        (dict(head_dim=0), "head_dim"),
        (dict(rms_norm_eps=0), "rms_eps"),
        (dict(rms_norm_eps=None), "rms_norm_eps"),
        (dict(rms_norm_eps="x"), "rms_norm_eps"),
        (dict(tie_word_embeddings=None), "tie_word_embeddings must be true or false"),
        (dict(attention_bias="no"), "attention_bias must be true or false"),
        (dict(mlp_bias=1), "mlp_bias must be true or false"),
        (dict(rope_theta="big"), "theta"),
        (dict(rope_theta=float("inf")), "theta"),
    ],
)
def test_refused(parsed, changes, message):
    with pytest.raises(ModelError, match=message) as caught:
        parsed(**changes)
    assert "\n" not in str(caught.value)


def test_missing_key_is_named(base):
    for key in ("hidden_size", "max_position_embeddings", "vocab_size"):
        with pytest.raises(ModelError, match=repr(key)):
            from_hf({k: v for k, v in base.items() if k != key}, None, "m")


def test_demo(demo):
    config = load_config(demo)
    assert (config.layers, config.hidden, config.q_heads, config.kv_heads) == (30, 576, 9, 3)
    assert (config.head_dim, config.vocab, config.max_positions) == (64, 49152, 8192)
    assert config.tied_embeddings and config.rope.theta == 100000.0
