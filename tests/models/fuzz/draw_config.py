"""Draws of config.json and generation_config.json, with the sizes of the tensors that belong to them."""

from typing import Any

from hypothesis import strategies as st

from .draw_rope import one_in, rope
from .recipe import Sizes

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UNKNOWN = {
    "architectures": (["LlamaForCausalLM"], ["MistralForCausalLM"], None),
    "torch_dtype": ("float16", "bfloat16", "float32", None),
    "dtype": ("bfloat16", "float32"),
    "use_cache": (False, True),
    "pretraining_tp": (1, 2),
    "attention_dropout": (0.0, 0.1),
    "initializer_range": (0.02,),
    "transformers_version": ("4.31.0", "5.24.0", None),
    "_name_or_path": ("somewhere/else",),
    "unsloth_fixed": (True,),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "return_dict": (True,),
    "foo": (None, 1, "x", [1, None], {"bar": None}),
}
sometimes, seldom = one_in(4), one_in(20)


@st.composite
def configs(draw: st.DrawFn, *, tokens: int) -> tuple[Sizes, dict[str, Any]]:
    """``tokens``: size of the tokenizer's vocabulary."""
    kind = draw(st.sampled_from(("llama", "llama", "mistral")))
    heads, kv_heads = draw(
        st.sampled_from(((1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 1), (4, 2), (4, 4), (6, 2), (8, 8)))
    )
    own_head_dim = draw(st.sampled_from((4, 8, 12, 16)))
    hidden = heads * own_head_dim
    head_dim = draw(st.sampled_from((own_head_dim, own_head_dim, 8, 16, 20)))
    sizes = Sizes(
        hidden=hidden,
        q_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=draw(st.sampled_from((8, 24, 40, 65))),
        layers=draw(st.integers(1, 3)),
        vocab=tokens + (-2 if draw(one_in(25)) else draw(st.sampled_from((0, 0, 1, 7, 64)))),
    )
    positions = draw(st.sampled_from((16, 32, 48, 64, 96)))
    config: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "vocab_size": sizes.vocab,
        "max_position_embeddings": positions,
    }
    if head_dim != own_head_dim or draw(st.booleans()):
        config["head_dim"] = head_dim
    elif draw(sometimes):
        config["head_dim"] = None
    if kv_heads == heads and kind == "llama" and draw(st.booleans()):
        config["num_key_value_heads"] = None
    # Absent, a Llama has as many as query heads, a Mistral 8.
    if kv_heads == (8 if kind == "mistral" else heads) and draw(st.booleans()):
        del config["num_key_value_heads"]
    config |= draw(rope(head_dim=head_dim, max_positions=positions))
    config |= draw(_constants(kind))
    config |= {name: draw(st.sampled_from(UNKNOWN[name])) for name in draw(_few(sorted(UNKNOWN)))}
    return sizes, dict(draw(st.permutations(list(config.items())))) if draw(seldom) else config


def _few(names: list[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(names), max_size=4, unique=True)


@st.composite
def _constants(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if not draw(one_in(6)):
        config["rms_norm_eps"] = draw(st.sampled_from((1e-5, 1e-6, 1e-2)))
    if draw(st.booleans()):
        config["hidden_act"] = draw(st.sampled_from(("gelu", "swish", "swish"))) if draw(seldom) else "silu"
    if draw(st.booleans()):
        config["tie_word_embeddings"] = draw(st.booleans())
    for name in ("attention_bias", "mlp_bias"):
        # A Mistral has no biases, whatever the configuration says.
        if draw(sometimes if kind == "llama" else seldom):
            config[name] = draw(st.booleans())
    if kind == "mistral":
        window = draw(st.sampled_from(("absent", None, None, None, 4096, 4096)))
        window = "small" if draw(seldom) else window
        if window == "small":
            config["sliding_window"] = draw(st.sampled_from((4, 8, 20)))
        elif window != "absent":
            config["sliding_window"] = window
    elif draw(one_in(80)):
        # Not a key of Llama's.
        config["sliding_window"] = 8
    if draw(one_in(80)):
        config["partial_rotary_factor"] = draw(st.sampled_from((1.0, 0.5)))
    return config


@st.composite
def special_ids(draw: st.DrawFn, *, vocab: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(bos, eos and padding ids of config.json; the object in generation_config.json, or None)."""
    ids = st.sampled_from((0, 1, 2, 2, 2, 3, vocab - 1))
    eos = st.one_of(
        st.just("absent"), st.none(), ids, ids, st.lists(ids, min_size=1, max_size=3, unique=True)
    )
    outside = st.sampled_from((-1, vocab, vocab + 5))
    bos = st.one_of(st.just("absent"), st.none(), ids, ids, ids, outside)
    padding = st.one_of(st.just("absent"), st.just("absent"), st.none(), ids)
    config = {"bos_token_id": draw(bos), "eos_token_id": draw(eos), "pad_token_id": draw(padding)}
    if draw(seldom):
        config["eos_token_id"] = draw(st.sampled_from((vocab, [2, vocab + 1], [], -1)))
    generation = None
    if draw(st.booleans()):
        generation = {"bos_token_id": draw(bos), "eos_token_id": draw(eos), "transformers_version": "5.24.0"}
        generation = _present(generation)
    return _present(config), generation


def _present(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value != "absent"}
