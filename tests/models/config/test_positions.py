"""The served length: --max-model-len, --rope-scaling, attention windows, and the errors that name the fix."""

import json

import pytest
import torch

from farshore.errors import ModelError
from farshore.models.config.hf import from_hf
from farshore.models.config.load import load_config
from farshore.models.config.rope_parameters import EXAMPLE
from farshore.models.llama import rotation_table

ORIGINAL = "original_max_position_embeddings"
YARN = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 64}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def table(config):
    return rotation_table(config, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("scaling", "served", "longest"),
    [
        ({"rope_type": "default"}, 128, 128),
        ({"rope_type": "linear", "factor": 2.5}, 320, 320),
        ({"rope_type": "linear", "factor": 0.5}, 128, 128),
        ({"rope_type": "dynamic", "factor": 3.0}, 128, 384),
        (YARN, 256, 256),
        (YARN | {"factor": 1.5}, 128, 128),
        ({"rope_type": "yarn", "factor": 4.0}, 512, 512),
        (LONGROPE | {ORIGINAL: 48}, 48, 128),
        (LONGROPE, 128, 128),
        (LLAMA3 | {ORIGINAL: 64}, 128, 128),
        (LLAMA3, 128, 128),
    ],
)
def test_lengths_of_a_scaling_in_the_file(base, scaling, served, longest):
    config = base | {"rope_scaling": scaling}
    assert from_hf(config, None, "m").max_positions == served
    for asked in (1, 47, longest):
        assert from_hf(config, None, "m", max_model_len=asked).max_positions == asked
    with pytest.raises(ModelError, match=f"exceeds the model's {longest} positions"):
        from_hf(config, None, "m", max_model_len=longest + 1)


@pytest.mark.parametrize(
    ("scaling", "served", "longest"),
    [
        ({"rope_type": "linear", "factor": 4}, 512, 512),
        ({"rope_type": "dynamic", "factor": 2.0}, 128, 256),
        ({"rope_type": "yarn", "factor": 4.0}, 512, 512),
        (YARN, 256, 256),
        (LLAMA3 | {ORIGINAL: 128}, 1024, 1024),
        (LONGROPE | {ORIGINAL: 128, "factor": 2.0}, 128, 256),
        ({"rope_type": "default"}, 128, 128),
        ({}, 128, 128),
    ],
)
def test_lengths_of_a_scaling_by_flag(base, their_table, scaling, served, longest):
    """The flag's scaling replaces the file's; theta stays; tables are transformers' for the same settings."""
    config = base | {"rope_scaling": LLAMA3 | {"rope_theta": 5e4}, ORIGINAL: 16}
    assert from_hf(config, None, "m", rope_scaling=scaling).max_positions == served
    longer = from_hf(config, None, "m", rope_scaling=scaling, max_model_len=longest)
    assert (longer.max_positions, longer.rope.theta) == (longest, 5e4)
    theirs = their_table(base | {"rope_scaling": scaling, "rope_theta": 5e4}, longest)
    assert all(torch.equal(a, b) for a, b in zip(table(longer), theirs, strict=True))
    with pytest.raises(ModelError, match=f"exceeds the model's {longest} positions"):
        from_hf(config, None, "m", rope_scaling=scaling, max_model_len=longest + 1)


def test_a_flag_may_change_theta(base):
    config = base | {"rope_theta": 5e4}
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e4}
    assert from_hf(config, None, "m", rope_scaling=scaling).rope.theta == 7e4


def test_a_shorter_length_changes_no_angle(base):
    """Formulas read the file's positions, not the served length."""
    for scaling in (YARN, {"rope_type": "dynamic", "factor": 2.0}, LONGROPE | {ORIGINAL: 64}, LLAMA3):
        whole = from_hf(base | {"rope_scaling": scaling}, None, "m")
        part = from_hf(base | {"rope_scaling": scaling}, None, "m", max_model_len=40)
        assert torch.equal(table(part)[0], table(whole)[0][:40])


def test_the_fix_of_a_length_that_is_too_long_works(base):
    with pytest.raises(ModelError, match="--rope-scaling") as caught:
        from_hf(base, None, "m", max_model_len=500)
    fix = str(caught.value).partition("--rope-scaling '")[2].rstrip("'")
    assert json.loads(fix) == {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 128}
    assert from_hf(base, None, "m", max_model_len=500, rope_scaling=json.loads(fix)).max_positions == 500


@pytest.mark.parametrize("length", [0, -1, 2.0, "8", True])
def test_a_length_must_be_a_positive_whole_number(base, length):
    with pytest.raises(ModelError, match="--max-model-len must be a positive whole number"):
        from_hf(base, None, "m", max_model_len=length)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ("yarn", "--rope-scaling must be an object, not 'yarn'; give for example"),
        ([], "must be an object"),
        ({"rope_type": "yarn"}, "lacks 'factor' in --rope-scaling; give for example"),
        (
            {"rope_type": "yarn", "factr": 4.0},
            "kind 'yarn' has no key 'factr'; its keys: rope_type, rope_theta",
        ),
        ({"rope_type": "linear", "factor": 4.0, ORIGINAL: 8192}, f"kind 'linear' has no key '{ORIGINAL}'"),
        ({"rope_type": "ntk", "factor": 4.0}, "'ntk' in --rope-scaling is unsupported; supported: 'default'"),
        ({"rope_type": "linear", "factor": "x"}, "factor must be a positive number"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_a_bad_scaling_by_flag(base, scaling, message):
    with pytest.raises(ModelError, match=message) as caught:
        from_hf(base, None, "m", rope_scaling=scaling)
    assert "\n" not in str(caught.value)


def test_the_example_is_good(base):
    scaling = json.loads(EXAMPLE.partition("'")[2].rstrip("'"))
    config = base | {"max_position_embeddings": 8192}
    assert from_hf(config, None, "m", rope_scaling=scaling).max_positions == 32_768


def test_lengths_stay_in_float32s_whole_numbers(base):
    huge = {"rope_type": "linear", "factor": 1e30}
    assert from_hf(base | {"rope_scaling": huge}, None, "m").max_positions == 1 << 24


@pytest.mark.parametrize(
    ("scaling", "original"),
    [({"rope_type": "dynamic", "factor": 4.0}, 128), (LONGROPE | {ORIGINAL: 48}, 48)],
)
def test_warning_above_the_original_length(base, scaling, original):
    config = base | {"rope_scaling": scaling}
    assert from_hf(config, None, "m").length_warning is None
    warning = from_hf(config, None, "m", max_model_len=original + 1).length_warning
    assert scaling["rope_type"] in warning and "\n" not in warning
    assert f"--max-model-len {original}" in warning
    assert from_hf(base | {"rope_scaling": YARN}, None, "m").length_warning is None


class TestWindow:
    """A window of at least the served length hides nothing; a shorter one is refused."""

    def test_mistral_without_the_key_has_transformers_default(self, base, their_config):
        config = base | {"model_type": "mistral", "max_position_embeddings": 32_768}
        del config["sliding_window"]
        assert their_config(config).sliding_window == 4096
        with pytest.raises(ModelError, match=r"window of 4096 tokens .*--max-model-len 4096"):
            from_hf(config, None, "m")
        with pytest.raises(ModelError, match="window of 4096"):
            from_hf(config, None, "m", max_model_len=4097)
        assert from_hf(config, None, "m", max_model_len=4096).max_positions == 4096
        assert from_hf(config | {"sliding_window": None}, None, "m").max_positions == 32_768
        assert from_hf(config | {"max_position_embeddings": 4096}, None, "m").max_positions == 4096

    def test_llama_has_none(self, base):
        config = {key: value for key, value in base.items() if key != "sliding_window"}
        assert from_hf(config | {"max_position_embeddings": 32_768}, None, "m").max_positions == 32_768

    @pytest.mark.parametrize(
        "more",
        [
            {"sliding_window": 100},
            {"attention_chunk_size": 100},
            {"sliding_window": 100, "layer_types": ["sliding_attention", "full_attention"]},
            {"sliding_window": 100, "attention_chunk_size": 120},
        ],
    )
    @pytest.mark.parametrize("family", ["llama", "mistral"])
    def test_windows_of_any_layer(self, base, more, family):
        config = base | more | {"model_type": family}
        with pytest.raises(ModelError, match="--max-model-len 100"):
            from_hf(config, None, "m")
        assert from_hf(config, None, "m", max_model_len=100).max_positions == 100

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"sliding_window": 0}, "sliding_window must be"),
            ({"sliding_window": -1}, "sliding_window must be"),
            ({"sliding_window": "4096"}, "sliding_window must be"),
            ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
            ({"layer_types": ["linear_attention", "full_attention"]}, "layer_types"),
            ({"layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
            ({"layer_types": "full_attention"}, "layer_types"),
        ],
    )
    def test_refused(self, base, more, message):
        with pytest.raises(ModelError, match=message):
            from_hf(base | more, None, "m")

    def test_layer_types_of_full_attention(self, base):
        for types in (None, ["full_attention"] * 2, ["attention"] * 2):
            assert from_hf(base | {"layer_types": types}, None, "m").max_positions == 128


def test_demo_with_flags(demo):
    """The same arguments for a GGUF file."""
    scaling = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 8192}
    config = load_config(demo, rope_scaling=scaling)
    assert (config.max_positions, config.rope.kind, config.rope.theta) == (32_768, "yarn", 100_000.0)
    assert load_config(demo, max_model_len=100).max_positions == 100
    with pytest.raises(ModelError, match="exceeds the model's 8192 positions") as caught:
        load_config(demo, max_model_len=20_000)
    assert f'--rope-scaling \'{{"rope_type":"yarn","factor":3.0,"{ORIGINAL}":8192}}\'' in str(caught.value)
