"""Shapes and rotary scaling from GGUF metadata. The expected angles are transformers' for the config.json
from which llama.cpp's converter writes such metadata."""

import gguf
import numpy as np
import pytest
import torch

from farshore.errors import ModelError
from farshore.models.config.load import load_config
from farshore.models.files.source import ModelSource
from farshore.models.llama import rotation_table
from farshore.models.weights.load import load_model

FACTOR, ORIGINAL = "llama.rope.scaling.factor", "llama.rope.scaling.original_context_length"
KIND, ATTENTION = "llama.rope.scaling.type", "llama.rope.scaling.attn_factor"
FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
DIVISORS = [1.0, 1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0]


@pytest.fixture
def written(tmp_path, base):
    """written(metadata, tensors={name: values}, biases=(...)) -> the source of a GGUF file of ``base``'s
    shape. A metadata value of None drops the key."""

    def write(metadata=(), *, tensors=None, biases=()):
        values = {
            "llama.block_count": base["num_hidden_layers"],
            "llama.context_length": base["max_position_embeddings"],
            "llama.embedding_length": base["hidden_size"],
            "llama.feed_forward_length": base["intermediate_size"],
            "llama.attention.head_count": base["num_attention_heads"],
            "llama.attention.head_count_kv": base["num_key_value_heads"],
            "llama.attention.layer_norm_rms_epsilon": base["rms_norm_eps"],
            "llama.vocab_size": base["vocab_size"],
            "llama.rope.freq_base": 5e4,
        } | dict(metadata)
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        adders = {
            bool: writer.add_bool,
            int: writer.add_int32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        for key, value in values.items():
            if value is not None:
                adders[type(value)](key, value)
        random = np.random.default_rng(3)
        rows = {"attn_q": 64, "attn_k": 32, "attn_v": 32, "attn_output": 64}
        rows |= {"ffn_gate": 96, "ffn_up": 96, "ffn_down": 64}
        shapes = {"token_embd.weight": (100, 64), "output_norm.weight": (64,)}
        for layer in range(base["num_hidden_layers"]):
            shapes |= {f"blk.{layer}.{norm}.weight": (64,) for norm in ("attn_norm", "ffn_norm")}
            for name, count in rows.items():
                columns = 96 if name == "ffn_down" else 64
                shapes[f"blk.{layer}.{name}.weight"] = (count, columns)
        shapes |= {bias: (rows[bias.split(".")[2]],) for bias in biases}
        for name, shape in shapes.items():
            writer.add_tensor(name, random.standard_normal(shape, dtype=np.float32))
        for name, divisors in (tensors or {}).items():
            writer.add_tensor(name, np.array(divisors, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return ModelSource("tiny", tmp_path / "m.gguf", "gguf")

    return write


LONGROPE = {"rope_type": "longrope", "short_factor": DIVISORS[::-1], "long_factor": DIVISORS}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = {
    "none": ({}, {}, {}),
    "none by name": ({KIND: "none", FACTOR: 4.0}, {}, {}),
    "linear by name": ({KIND: "linear", FACTOR: 4.0}, {}, {"rope_type": "linear", "factor": 4.0}),
    "a factor alone is linear": ({FACTOR: 4.0}, {}, {"rope_type": "linear", "factor": 4.0}),
    "a factor of 0 is none": ({FACTOR: 0.0}, {}, {}),
    "the factor's first name": ({"llama.rope.scale_linear": 4.0}, {}, {"rope_type": "linear", "factor": 4.0}),
    "the second name wins": (
        {FACTOR: 2.0, "llama.rope.scale_linear": 4.0},
        {},
        {"rope_type": "linear", "factor": 2.0},
    ),
    "yarn": ({KIND: "yarn", FACTOR: 4.0, ORIGINAL: 64}, {}, YARN),
    "yarn, no original": (
        {KIND: "yarn", FACTOR: 4.0},
        {},
        YARN | {"original_max_position_embeddings": 128},
    ),
    "yarn, betas": (
        {
            KIND: "yarn",
            FACTOR: 4.0,
            ORIGINAL: 64,
            "llama.rope.scaling.yarn_beta_fast": 16.0,
            "llama.rope.scaling.yarn_beta_slow": 0.5,
            "llama.rope.scaling.yarn_ext_factor": 1.0,
        },
        {},
        YARN | {"beta_fast": 16.0, "beta_slow": 0.5},
    ),
    "longrope": (
        {KIND: "longrope", ORIGINAL: 48, ATTENTION: 1.25},
        {LONG: DIVISORS, SHORT: DIVISORS[::-1]},
        LONGROPE | {"original_max_position_embeddings": 48, "attention_factor": 1.25},
    ),
}


def table(config):
    return rotation_table(config, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("case", SCALINGS)
def test_scalings(base, their_table, written, case):
    metadata, tensors, scaling = SCALINGS[case]
    source = written(metadata, tensors=tensors)
    theirs = base | {"rope_parameters": scaling | {"rope_theta": 5e4}}
    for tokens in (40, 48, 49, 128):
        ours = table(load_config(source, max_model_len=tokens))
        assert all(torch.equal(a, b) for a, b in zip(ours, their_table(theirs, tokens), strict=True))


def test_default_lengths(written):
    for case, length in {"none": 128, "linear by name": 512, "yarn": 256, "longrope": 48}.items():
        metadata, tensors, _ = SCALINGS[case]
        assert load_config(written(metadata, tensors=tensors)).max_positions == length


def test_factors_of_llama3_multiply_with_a_linear_factor(written):
    """As in llama.cpp, which divides by both."""
    plain = load_config(written())
    for metadata, factor in (({}, 1.0), ({FACTOR: 2.0}, 2.0)):
        config = load_config(written(metadata, tensors={FREQS: DIVISORS}), max_model_len=20)
        expected = torch.arange(0, 16, 2) / 16
        expected = 1.0 / 5e4**expected / factor / torch.tensor(DIVISORS)
        torch.testing.assert_close(table(config)[0][7], (7 * expected).cos())
        assert config.rope != plain.rope


def test_an_attention_factor_multiplies_every_kind(written):
    cos, sin = table(load_config(written({ATTENTION: 1.5})))
    assert torch.equal(cos[0], torch.full((8,), 1.5)) and not sin[0].any()
    yarn = {KIND: "yarn", FACTOR: 4.0, ORIGINAL: 64}
    alone, both = (load_config(written(yarn | more)).rope for more in ({}, {ATTENTION: 1.5}))
    assert both.attention_factor == alone.attention_factor * 1.5


def test_a_flag_replaces_the_files_scaling(written, base, their_table):
    scaling = {"rope_type": "linear", "factor": 2.0}
    source = written({FACTOR: 4.0, ATTENTION: 1.5}, tensors={FREQS: DIVISORS})
    theirs = their_table(base | {"rope_scaling": scaling, "rope_theta": 5e4}, 256)
    ours = table(load_config(source, rope_scaling=scaling))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        (
            {KIND: "dynamic"},
            {},
            "'dynamic' is unsupported; supported: 'none', 'linear', 'yarn' and 'longrope'",
        ),
        ({KIND: 3}, {}, "rope kind 3 is unsupported"),
        ({FACTOR: -1.0}, {}, "factor must be a positive number"),
        ({KIND: "longrope"}, {}, "go with rope kind 'longrope'"),
        ({KIND: "longrope"}, {LONG: DIVISORS}, "go with rope kind 'longrope'"),
        ({}, {LONG: DIVISORS, SHORT: DIVISORS}, "go with rope kind 'longrope'"),
        ({KIND: "longrope", FACTOR: 2.0}, {LONG: DIVISORS, SHORT: DIVISORS}, "further factors"),
        ({}, {FREQS: DIVISORS[:4]}, "factors must be 8 positive numbers"),
        ({}, {FREQS: [0.0] * 8}, "factors must be 8 positive numbers"),
        ({KIND: "yarn", "llama.rope.scaling.yarn_ext_factor": 0.5}, {}, "yarn_ext_factor 0.5 is unsupported"),
        ({KIND: "yarn", "llama.rope.scaling.yarn_attn_factor": 1.0}, {}, "yarn_attn_factor"),
        ({"llama.rope.scaling.alpha": 1000.0}, {}, "alpha"),
        ({"llama.rope.dimension_count": 8}, {}, "part of each head"),
        ({"llama.attention.key_length": 32}, {}, "different lengths"),
        ({"llama.attention.value_length": 32}, {}, "different lengths"),
        ({"llama.attention.scale": 0.5}, {}, "attention.scale 0.5 is unsupported"),
        ({"llama.logit_scale": 0.5}, {}, "logit_scale"),
        ({"llama.attention.causal": False}, {}, "causal"),
        ({"llama.attention.sliding_window": 64}, {}, "--max-model-len 64"),
        ({"llama.context_length": 0}, {}, "context_length must be a positive"),
    ],
)
def test_refused(written, metadata, tensors, message):
    with pytest.raises(ModelError, match=message) as caught:
        load_config(written(metadata, tensors=tensors))
    assert "\n" not in str(caught.value)


def test_neutral_metadata(written):
    neutral = {
        "llama.attention.scale": 0.0,
        "llama.logit_scale": 1.0,
        "llama.attention.causal": True,
        "llama.attention.sliding_window": 0,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
    }
    assert load_config(written(neutral)) == load_config(written())


def test_end_tokens_are_the_tokenizers(written):
    assert load_config(written({"tokenizer.ggml.eos_token_id": 2})).eos_token_ids == ()


ALL = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@pytest.mark.parametrize("biased", [(), ("attn_q",), ALL[:3], ALL[:4], ALL[4:], ALL])
def test_biases_of_any_matrix(written, biased):
    """A q bias asks for no o bias."""
    source = written(biases=[f"blk.{layer}.{name}.bias" for layer in range(2) for name in biased])
    model = load_model(source, dtype=torch.float32)
    fields = ("q", "k", "v", "o", "gate", "up", "down")
    expected = tuple(field for field, name in zip(fields, ALL, strict=True) if name in biased)
    assert model.config.biases == expected
    for layer in model.weights.layers:
        assert tuple(field for field in fields if getattr(layer, f"{field}_bias") is not None) == expected


def test_biases_in_some_layers_are_refused(written):
    with pytest.raises(ModelError, match=r"attn_v\.bias in 1 of 2 layers"):
        load_config(written(biases=["blk.1.attn_v.bias"]))
