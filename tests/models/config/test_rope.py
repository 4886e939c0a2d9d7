"""Rotation tables of every kind of scaling, in every spelling, equal transformers' bit for bit."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farshore.errors import ModelError
from farshore.models.config.hf import from_hf
from farshore.models.llama import rotation_table

LONGROPE = dict(
    rope_type="longrope",
    short_factor=[1.0 + 0.1 * i for i in range(8)],
    long_factor=[1.5 + i for i in range(8)],
)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
ORIGINAL = "original_max_position_embeddings"
KINDS = {
    "default": dict(rope_type="default"),
    "linear": dict(rope_type="linear", factor=3.0),
    "linear, whole": dict(rope_type="linear", factor=2),
    "linear, below 1": dict(rope_type="linear", factor=0.7),
    "dynamic": dict(rope_type="dynamic", factor=2.7),
    "dynamic, whole": dict(rope_type="dynamic", factor=4),
    "yarn": dict(rope_type="yarn", factor=4.0, **{ORIGINAL: 64}),
    "yarn, whole": dict(rope_type="yarn", factor=4, **{ORIGINAL: 64}),
    "yarn, no original": dict(rope_type="yarn", factor=4.0),
    "yarn, no factor": dict(rope_type="yarn", factor=None, **{ORIGINAL: 32}),
    "yarn, below 1": dict(rope_type="yarn", factor=0.5, **{ORIGINAL: 64}),
    "yarn, attention": dict(rope_type="yarn", factor=4.0, attention_factor=0.8, **{ORIGINAL: 64}),
    "yarn, betas": dict(rope_type="yarn", factor=8.0, beta_fast=20, beta_slow=0.5, **{ORIGINAL: 4096}),
    "yarn, no betas": dict(rope_type="yarn", factor=8.0, beta_fast=None, beta_slow=None, **{ORIGINAL: 64}),
    "yarn, mscale": dict(
        rope_type="yarn", factor=40, mscale=0.707, mscale_all_dim=0.9, **{ORIGINAL: 4096}, beta_fast=32
    ),
    "yarn, half an mscale": dict(rope_type="yarn", factor=40, mscale=0.707, mscale_all_dim=0),
    "yarn, not truncated": dict(rope_type="yarn", factor=32.0, truncate=False, **{ORIGINAL: 4096}),
    "yarn, truncate null": dict(rope_type="yarn", factor=32.0, truncate=None, **{ORIGINAL: 4096}),
    "longrope": LONGROPE | {ORIGINAL: 48},
    "longrope, no original": LONGROPE,
    "longrope, factor": LONGROPE | {ORIGINAL: 48, "factor": 4.0},
    "longrope, factor below 1": LONGROPE | {ORIGINAL: 48, "factor": 0.5},
    "longrope, attention": LONGROPE | {ORIGINAL: 48, "attention_factor": 1.25},
    "llama3": LLAMA3 | {ORIGINAL: 64},
    "llama3, no original": LLAMA3,
}
SPELLINGS = {
    "rope_parameters": lambda kind: dict(rope_parameters=kind | {"rope_theta": 5e4}),
    "rope_parameters, theta outside": lambda kind: dict(rope_parameters=kind, rope_theta=50000),
    "rope_scaling": lambda kind: dict(rope_scaling=kind, rope_theta=5e4),
    "type": lambda kind: dict(rope_scaling=renamed(kind), rope_theta=5e4),
    "both, theta inside": lambda kind: dict(
        rope_scaling=kind | {"rope_theta": 5e4},
        rope_parameters=dict(rope_type="linear", factor=9.0, rope_theta=7.0),
        rope_theta=3.0,
    ),
    "both, one empty": lambda kind: dict(rope_scaling={}, rope_parameters=kind | {"rope_theta": 5e4}),
    "both, one null": lambda kind: dict(rope_scaling=None, rope_parameters=kind | {"rope_theta": 5e4}),
    "default theta": lambda kind: dict(rope_scaling=kind),
    "both types": lambda kind: dict(rope_scaling=kind | {"type": "linear"}, rope_theta=5e4),
    "not partial": lambda kind: dict(rope_scaling=kind | {"partial_rotary_factor": 1.0}, rope_theta=5e4),
}


def renamed(kind):
    return {"type" if key == "rope_type" else key: value for key, value in kind.items()}


def our_table(config, tokens, dtype=torch.float32):
    """The table of a model that is served to ``tokens`` tokens."""
    shape = from_hf(json.loads(json.dumps(config)), None, "m", max_model_len=tokens)
    return rotation_table(shape, dtype=dtype, device=torch.device("cpu"))


def assert_equal_tables(config, tokens, their_table, dtype=torch.float32):
    for ours, theirs in zip(
        our_table(config, tokens, dtype), their_table(config, tokens, dtype), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_short_and_long_sequences(base, their_table, kind):
    """Lengths below, at and above the original ones: 48 for longrope, 128 for dynamic."""
    config = base | {"rope_scaling": KINDS[kind], "rope_theta": 5e4}
    longest = from_hf(config, None, "m").max_positions
    lengths = {20, 48, 49, 128} | ({129, 250, 300} if longest > 250 or "dynamic" in kind else set())
    for tokens in sorted(lengths):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            if tokens <= longest or "dynamic" in kind:
                assert_equal_tables(config, tokens, their_table, dtype)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_tables_of_every_spelling(base, their_table, spelling):
    for kind in KINDS.values():
        assert_equal_tables(base | SPELLINGS[spelling](kind), 100, their_table)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_mistral(base, their_table, kind):
    config = base | {"rope_parameters": KINDS[kind], "model_type": "mistral"}
    assert_equal_tables(config, 100, their_table)


@pytest.mark.parametrize("kind", ["yarn", "longrope", "llama3"])
def test_an_original_length_outside_wins(base, their_table, kind):
    config = base | {"rope_scaling": KINDS[kind], ORIGINAL: 40}
    assert_equal_tables(config, 30, their_table)
    assert_equal_tables(config, 100, their_table)
    inside = base | {"rope_scaling": KINDS[kind]}
    assert not torch.equal(our_table(config, 45)[0], our_table(inside, 45)[0])


def test_no_scaling_at_all(base, their_table):
    for more in ({}, {"rope_theta": 77.0}, {"rope_parameters": None}, {"rope_scaling": None}):
        assert_equal_tables(base | more, 128, their_table)


def test_the_first_name_of_longrope(base):
    """transformers 5 has forgotten "su"; files of the first Phi-3 models have it."""
    new = base | {"rope_scaling": KINDS["longrope"]}
    old = base | {"rope_scaling": renamed(KINDS["longrope"]) | {"type": "su"}}
    for tokens in (40, 100):
        assert torch.equal(our_table(old, tokens)[0], our_table(new, tokens)[0])


@pytest.mark.parametrize("kind", ["default", "yarn", "dynamic", "longrope"])
def test_a_table_of_several_pieces(base, their_table, kind):
    config = base | {"rope_scaling": KINDS[kind], "max_position_embeddings": 40_000}
    assert_equal_tables(config, 40_000, their_table, torch.bfloat16)


REFUSED = [
    ({"rope_type": "yarn"}, "'yarn' lacks 'factor' in config.json"),
    ({"rope_type": "linear"}, "'linear' lacks 'factor'"),
    ({"rope_type": "llama3", "factor": 8.0}, "'llama3' lacks 'low_freq_factor'"),
    ({"rope_type": "longrope"}, "'longrope' lacks 'short_factor'"),
    ({"rope_type": "mrope"}, "'mrope' in config.json is unsupported; supported: 'default', 'linear'"),
    ({"rope_type": "proportional"}, "'proportional'"),
    ({"rope_type": None}, "None"),
    ({"rope_type": ["yarn"]}, "yarn"),
    ({"full_attention": {"rope_type": "default"}}, "by layer type"),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_type": "linear", "factor": None}, "factor must be a positive number"),
    ({"rope_type": "linear", "factor": 0}, "factor must be a positive number"),
    ({"rope_type": "dynamic", "factor": True}, "factor must be a positive number"),
    ({"rope_type": "yarn", "factor": "4"}, "factor must be a number"),
    ({"rope_type": "yarn", "factor": 4.0, ORIGINAL: None}, "must be a number"),
    ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}, "theta above 1"),
    ({"rope_type": "yarn", "factor": 4.0, "attention_factor": -1}, "attention_factor"),
    ({"rope_type": "default", "rope_theta": None}, "theta"),
    (LONGROPE | {"long_factor": [1.0]}, "long_factors must be 8 positive numbers"),
    (LONGROPE | {"short_factor": [0.0] * 8}, "short_factors must be 8 positive numbers"),
    (LONGROPE | {"short_factor": 2.0}, "must be a list of numbers"),
    (LONGROPE | {ORIGINAL: 1, "factor": 2.0}, "must exceed 1"),
    (LLAMA3 | {"low_freq_factor": 4.0}, "high_freq_factor must exceed"),
    ("linear", "must be an object"),
]


@pytest.mark.parametrize(("scaling", "message"), REFUSED)
def test_refused(base, scaling, message):
    with pytest.raises(ModelError, match=message) as caught:
        from_hf(base | {"rope_scaling": scaling}, None, "m")
    assert "\n" not in str(caught.value)


def test_partial_rotation_outside_is_refused(base):
    with pytest.raises(ModelError, match="partial_rotary_factor"):
        from_hf(base | {"partial_rotary_factor": 0.5}, None, "m")
    assert from_hf(base | {"partial_rotary_factor": 1.0}, None, "m").head_dim == 16


def test_dynamic_scaling_of_two_dimensions_is_refused(base):
    """transformers divides by zero."""
    with pytest.raises(ModelError, match="head_dim of 4 or more"):
        from_hf(base | {"head_dim": 2, "rope_scaling": KINDS["dynamic"]}, None, "m")


numbers = st.one_of(st.sampled_from([None, 1, 2, 4.0, 32]), st.floats(0.25, 64))
scalings = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "dynamic", "yarn", "longrope", "llama3"])},
    optional={
        "factor": numbers,
        ORIGINAL: st.sampled_from([16, 64, 128, 4096]),
        "attention_factor": st.one_of(st.none(), st.floats(0.5, 2.0)),
        "beta_fast": st.one_of(st.none(), st.floats(2.0, 64.0)),
        "beta_slow": st.one_of(st.none(), st.floats(0.25, 2.0)),
        "mscale": st.one_of(st.none(), st.floats(0.1, 2.0)),
        "mscale_all_dim": st.one_of(st.none(), st.floats(0.1, 2.0)),
        "truncate": st.booleans(),
        "low_freq_factor": st.floats(0.5, 2.0),
        "high_freq_factor": st.floats(2.5, 8.0),
        "short_factor": st.lists(st.floats(0.5, 4.0), min_size=8, max_size=8),
        "long_factor": st.lists(st.floats(0.5, 64.0), min_size=8, max_size=8),
        "rope_theta": st.one_of(st.floats(2.0, 1e7), st.integers(2, 10**7)),
    },
)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    scaling=scalings,
    inner=scalings,
    theta=st.floats(2.0, 1e6),
    outer=st.sampled_from([None, 16, 100]),
    tokens=st.integers(1, 140),
)
def test_any_scaling_is_transformers_or_refused(base, their_table, scaling, inner, theta, outer, tokens):
    config = base | {"rope_scaling": scaling, "rope_parameters": inner, "rope_theta": theta}
    if outer is not None:
        config |= {ORIGINAL: outer}
    try:
        ours = our_table(config, tokens)
    except ModelError:
        return
    for mine, theirs in zip(ours, their_table(config, tokens), strict=True):
        assert torch.equal(mine, theirs)
