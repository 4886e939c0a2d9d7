"""Model shapes from config.json and GGUF metadata, and the configurations that are refused."""

import pytest

from farshore.errors import ModelError
from farshore.models.config.hf import from_hf
from farshore.models.config.load import load_config
from farshore.models.config.rope import RopeConfig

BASE = dict(
    model_type="llama",
    num_hidden_layers=2,
    hidden_size=64,
    num_attention_heads=8,
    num_key_value_heads=2,
    intermediate_size=96,
    vocab_size=100,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def parsed(generation=None, **changes):
    return from_hf(BASE | changes, generation, "m")


def test_defaults():
    config = parsed()
    assert (config.head_dim, config.group, config.eos_token_ids) == (8, 4, ())
    assert config.rope == RopeConfig(theta=10000.0)
    assert parsed(num_key_value_heads=None).kv_heads == 8
    assert parsed(head_dim=16).head_dim == 16
    assert parsed(model_type="mistral", sliding_window=None).layers == 2


def test_rope_old_and_new_spelling():
    old = parsed(rope_theta=5e5, rope_scaling={"rope_type": "llama3"} | LLAMA3)
    new = parsed(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3)
    assert old.rope == new.rope
    assert (new.rope.kind, new.rope.theta, new.rope.original_positions) == ("llama3", 5e5, 8192)
    assert parsed(rope_scaling={"type": "linear", "factor": 2.0}).rope == RopeConfig(
        kind="linear", factor=2.0
    )
    assert parsed(rope_scaling=None, rope_theta=7.0).rope.theta == 7.0


def test_eos_ids_of_both_files_without_repeats():
    assert parsed({"eos_token_id": [5, 7]}, eos_token_id=7).eos_token_ids == (5, 7)
    assert parsed({"eos_token_id": 3}, eos_token_id=[9]).eos_token_ids == (3, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="gpt_neox"), "supported: model_type 'llama'"),
        (dict(model_type=None), "supported"),
        (dict(model_type="mistral", sliding_window=4096), "sliding window"),
        (dict(hidden_act="gelu"), "silu"),
        (dict(quantization_config={"quant_method": "gptq"}), "GGUF"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "'yarn' is unsupported"),
        (dict(rope_scaling={"rope_type": "linear"}), "'factor'"),
        (dict(rope_scaling="linear"), "object"),
        (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial_rotary"),
        (dict(rope_theta="big"), "theta"),
        (dict(rope_theta=float("inf")), "theta"),
        (dict(rope_scaling={"rope_type": "llama3"} | LLAMA3 | {"low_freq_factor": 4.0}), "high_freq"),
        (dict(num_hidden_layers=0), "layers"),
        (dict(num_hidden_layers=True), "layers"),
        (dict(vocab_size="many"), "vocab"),
        (dict(hidden_size=None), "hidden"),
        (dict(num_attention_heads=0), "heads"),
        (dict(num_key_value_heads=3), "evenly"),
        (dict(head_dim=7), "even"),
        (dict(rms_norm_eps=0), "rms_eps"),
        (dict(rms_norm_eps="x"), "rms_norm_eps"),
        (dict(eos_token_id=100), "outside"),
        (dict(eos_token_id=[[1]]), "outside"),
        (dict(bos_token_id=-1), "outside"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ModelError, match=message) as caught:
        parsed(**changes)
    assert "\n" not in str(caught.value)


def test_missing_key_is_named():
    with pytest.raises(ModelError, match="'hidden_size'"):
        from_hf({k: v for k, v in BASE.items() if k != "hidden_size"}, None, "m")


def test_demo(demo):
    config = load_config(demo)
    assert (config.layers, config.hidden, config.q_heads, config.kv_heads) == (30, 576, 9, 3)
    assert (config.head_dim, config.vocab, config.max_positions) == (64, 49152, 8192)
    assert config.tied_embeddings and config.rope.theta == 100000.0
    assert config.eos_token_ids == (2,)
