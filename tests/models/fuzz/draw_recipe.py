"""Draws of whole checkpoints."""

from hypothesis import strategies as st

from .draw_config import PROJECTIONS, configs, special_ids
from .draw_rope import one_in, options
from .draw_tokenizer import texts, tokenizers
from .recipe import DTYPES, LAYOUTS, Layout, Recipe, Tensors
from .tokenizer_files import size

BESIDE = ("consolidated.safetensors", "model-00001-of-00003.safetensors", "adapter.safetensors")
UNUSED = (
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.9.mlp.up_proj.weight",
    "v_head.weight",
)
USUAL = LAYOUTS[:4]


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    tokenizer = draw(tokenizers())
    sizes, config = draw(configs(tokens=size(tokenizer.kind, tokenizer.prefix)))
    ids, generation = draw(special_ids(vocab=sizes.vocab))
    config |= ids
    if tokenizer.config is None and draw(st.booleans()):
        config["tokenizer_class"] = draw(st.sampled_from(("LlamaTokenizer", "PreTrainedTokenizerFast")))
    return Recipe(
        sizes=sizes,
        config=config,
        generation=generation,
        tensors=draw(_tensors(config)),
        layout=Layout(
            kind=draw(st.sampled_from(LAYOUTS if draw(one_in(15)) else USUAL)),
            beside=tuple(draw(st.lists(st.sampled_from(BESIDE), max_size=1))) if draw(st.booleans()) else (),
        ),
        tokenizer=tokenizer,
        prompts=tuple(draw(st.lists(texts, min_size=3, max_size=3))),
        options=draw(options(head_dim=sizes.head_dim, max_positions=config["max_position_embeddings"])),
    )


@st.composite
def _tensors(draw: st.DrawFn, config: dict) -> Tensors:
    biases: tuple[str, ...] = ()
    if config["model_type"] == "llama":
        biases += PROJECTIONS[:4] if config.get("attention_bias") else ()
        biases += PROJECTIONS[4:] if config.get("mlp_bias") else ()
    if draw(one_in(20)):
        biases = draw(st.sampled_from((PROJECTIONS[:3], PROJECTIONS[:4], (), PROJECTIONS)))
    tied = config.get("tie_word_embeddings", False)
    heads = ("absent", "absent", "equal", "different") if tied else ("different", "different", "equal")
    missing = None
    if draw(one_in(50)):
        missing = draw(st.sampled_from(("norm.weight", "layers.0.mlp.up_proj.weight", "embed_tokens.weight")))
    return Tensors(
        seed=draw(st.integers(0, 99)),
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        norm_dtype=draw(st.sampled_from(sorted(DTYPES))),
        head="absent" if draw(one_in(50)) else draw(st.sampled_from(heads)),
        embed=not draw(one_in(100)),
        prefix="" if draw(one_in(15)) else "model.",
        biases=biases,
        extra=tuple(draw(st.lists(st.sampled_from(UNUSED), max_size=2, unique=True))),
        missing=missing,
    )
