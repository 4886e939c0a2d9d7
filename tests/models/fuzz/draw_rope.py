"""Draws of RoPE settings, in every spelling that config.json files use."""

from typing import Any

from hypothesis import strategies as st

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
FACTORS = st.sampled_from([1.0, 1.5, 2.0, 4.0, 8, 2])
THETAS = st.sampled_from([10000.0, 10000, 500000.0, 1000000, 100.0] * 12 + [None])


def one_in(count: int) -> st.SearchStrategy[bool]:
    """True once in ``count`` draws: integers() would prefer its ends."""
    return st.sampled_from((False,) * (count - 1) + (True,))


@st.composite
def rope(draw: st.DrawFn, *, head_dim: int, max_positions: int) -> dict[str, Any]:
    """The keys of config.json that say how positions are rotated."""
    kind = draw(st.sampled_from(("default", *KINDS)))
    place = draw(st.sampled_from(("rope_parameters", "rope_scaling", "rope_scaling", "both")))
    theta = draw(st.sampled_from(("top", "inside", "both", "absent")))
    if kind == "default" and draw(st.booleans()):
        # As in most files: no scaling at all.
        config = draw(
            st.sampled_from(({}, {"rope_scaling": None}, {"rope_parameters": None}, {"rope_scaling": {}}))
        )
        return dict(config) | ({"rope_theta": draw(THETAS)} if theta != "absent" else {})
    given = draw(_named(kind)) | draw(_constants(kind, head_dim=head_dim, max_positions=max_positions))
    config: dict[str, Any] = {}
    if theta in ("inside", "both"):
        given["rope_theta"] = draw(THETAS)
    if theta in ("top", "both"):
        config["rope_theta"] = draw(THETAS)
    if given.get("original_max_position_embeddings") and draw(one_in(8)):
        # As in Phi-3's files.
        config["original_max_position_embeddings"] = draw(st.sampled_from((8, 16, 32)))
        if draw(st.booleans()):
            del given["original_max_position_embeddings"]
    if place != "both":
        return config | {place: given}
    other = draw(st.sampled_from(KINDS))
    second = draw(
        st.sampled_from(
            (
                given,
                {},
                None,
                draw(_named(other)) | draw(_constants(other, head_dim=head_dim, max_positions=max_positions)),
            )
        )
    )
    pair = (given, second) if draw(st.booleans()) else (second, given)
    return config | dict(zip(("rope_scaling", "rope_parameters"), pair, strict=True))


@st.composite
def options(draw: st.DrawFn, *, head_dim: int, max_positions: int) -> dict[str, Any]:
    """Command-line options that change positions, as ModelSpec's fields."""
    given: dict[str, Any] = {}
    if draw(one_in(6)):
        kind = draw(st.sampled_from(KINDS[1:]))
        constants = draw(_constants(kind, head_dim=head_dim, max_positions=max_positions))
        given["rope_scaling"] = {"rope_type": kind} | constants
        if draw(one_in(4)):
            given["rope_scaling"]["rope_theta"] = draw(THETAS)
    if draw(one_in(6)):
        # Longer than the model only with a scaling, most of the time.
        lengths = (8, 12, 16, max_positions, 100 if given or draw(one_in(6)) else max_positions - 3)
        given["max_model_len"] = draw(st.sampled_from(lengths))
    return given


@st.composite
def _named(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    spelling = draw(st.sampled_from(("rope_type", "rope_type", "type", "both", "conflict", "neither")))
    if spelling == "neither" and kind != "default":
        # A factor without a kind.
        spelling = spelling if draw(one_in(4)) else "rope_type"
    return {
        "rope_type": {"rope_type": kind},
        "type": {"type": kind},
        "both": {"type": kind, "rope_type": kind},
        "conflict": {"type": draw(st.sampled_from(KINDS)), "rope_type": kind},
        "neither": {},
    }[spelling]


@st.composite
def _constants(draw: st.DrawFn, kind: str, *, head_dim: int, max_positions: int) -> dict[str, Any]:
    if kind == "default":
        return {}
    given: dict[str, Any] = {"factor": draw(FACTORS)}
    originals = st.sampled_from([length for length in (8, 16, 32, 64) if length <= max_positions])
    if kind in ("yarn", "longrope", "llama3") and not draw(one_in(5)):
        given["original_max_position_embeddings"] = draw(originals)
    if kind == "llama3":
        given["low_freq_factor"] = draw(st.sampled_from((1.0, 0.5, 1)))
        given["high_freq_factor"] = draw(st.sampled_from((4.0, 2, 8.0)))
    if kind == "longrope":
        factors = st.lists(
            st.sampled_from((1.0, 1.25, 2.0, 3.5, 8.0)), min_size=head_dim // 2, max_size=head_dim // 2
        )
        given["short_factor"], given["long_factor"] = draw(factors), draw(factors)
        if draw(st.booleans()):
            del given["factor"]
        if draw(st.booleans()):
            given["attention_factor"] = draw(st.sampled_from((1.0, 1.2, None)))
    if kind == "yarn":
        options = {
            "attention_factor": (1.0, 1.3, 0.8, None),
            "beta_fast": (32, 16.0, 4, None),
            "beta_slow": (1, 2.0, None),
            "mscale": (1.0, 0.707, None),
            "mscale_all_dim": (1.0, 0.5, 0),
            "truncate": (True, False),
        }
        for option, values in options.items():
            if draw(one_in(3)):
                given[option] = draw(st.sampled_from(values))
    if draw(one_in(30)):
        del given[draw(st.sampled_from(sorted(given)))]
    return given
