"""Draws of tokenizer files, and of the text that is tokenized."""

from typing import Any

from hypothesis import strategies as st

from .draw_rope import one_in
from .tokenizer_files import EXTRA, KINDS, SPECIAL, TokenizerRecipe, token_ids

CLASSES = (
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "PreTrainedTokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
)
PIECES = (
    *SPECIAL,
    *EXTRA,
    " ",
    "  ",
    "\n",
    "▁",
    "the cat",
    " sat",
    "The quick",
    "isn't",
    "12",
    "Привет",
    "日本語",
    "ü",
    "é",
    "👩‍👩‍👧",
    ".",
    " ,",
    "<s",
    "<new>",
    "[PAD]",
    "\t",
    "½",
)
texts = st.one_of(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=10).map("".join),
    st.text(min_size=1, max_size=12),
)
sometimes = one_in(4)


@st.composite
def tokenizers(draw: st.DrawFn) -> TokenizerRecipe:
    kind = draw(st.sampled_from((*KINDS[:4], *KINDS)))
    schemes = ("always", "first", "never") if kind in ("metaspace", "unigram") else ("always", "never")
    if kind == "byte-level":
        schemes = ("never", "never", "always")
    posts = ("bos", "bos", "bos", "none", "none", "bos and eos")
    flags = {}
    for text in (*EXTRA, SPECIAL[2]):
        if draw(sometimes):
            names = draw(st.lists(st.sampled_from(("lstrip", "rstrip", "normalized", "single_word"))))
            flags[text] = dict.fromkeys(names, True)
    prefix = draw(st.sampled_from(schemes))
    return TokenizerRecipe(
        kind=kind,
        prefix=prefix,
        post=draw(st.sampled_from((*posts, "byte-level") if kind == "byte-level" else posts)),
        truncation=draw(st.sampled_from((None, None, None, 4))),
        padding=draw(st.sampled_from((None, None, None, 24))),
        ignore_merges=kind == "byte-level" and draw(st.booleans()),
        flags=flags,
        config=None if draw(one_in(5)) else draw(_configs(kind, prefix)),
        special_map=draw(st.one_of(st.none(), _special_maps())),
        added=draw(st.sampled_from(({}, {"<new>": 0}))) if draw(one_in(6)) else None,
    )


@st.composite
def _configs(draw: st.DrawFn, kind: str, prefix: str) -> dict[str, Any]:
    config: dict[str, Any] = {}
    # No model has LlamaTokenizer over Unigram.
    classes = CLASSES[2:] if kind.endswith("unigram") and not draw(one_in(20)) else CLASSES
    if kind in ("metaspace", "prepend", "sentencepiece bpe"):
        classes = CLASSES[:2] + CLASSES
    if not draw(one_in(8)):
        config["tokenizer_class"] = draw(st.sampled_from(classes))
    for role, text in zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True):
        value = draw(_special(text))
        config |= _one(role, {"__type": "AddedToken"} | value if isinstance(value, dict) else value)
    if draw(sometimes):
        config["eos_token"] = EXTRA[0]
    if draw(sometimes):
        # The last is in no vocabulary.
        config["pad_token"] = draw(st.sampled_from((SPECIAL[0], SPECIAL[2], None, "[PAD]")))
    if draw(one_in(20)):
        config["image_token"] = draw(st.sampled_from((EXTRA[1], "<img>")))
    if draw(one_in(20)):
        config["split_special_tokens"] = draw(st.booleans())
    for name in ("add_bos_token", "add_eos_token"):
        if draw(sometimes):
            config[name] = draw(st.sampled_from((True, True, False, None)))
    if draw(sometimes):
        config["legacy"] = draw(st.sampled_from((True, False, None)))
    if draw(sometimes):
        config["add_prefix_space"] = draw(st.sampled_from((True, False, None)))
    if draw(sometimes):
        config["clean_up_tokenization_spaces"] = draw(st.booleans()) and kind != "unigram"
    if draw(sometimes):
        config["model_max_length"] = draw(st.sampled_from((8, 4096, 10**30)))
    if draw(sometimes):
        extra = draw(st.sampled_from(("additional_special_tokens", "extra_special_tokens")))
        config[extra] = draw(st.sampled_from(([EXTRA[0]], list(EXTRA), [], ["<new>"])))
    if draw(st.booleans()):
        ids = token_ids(kind, prefix)
        listed = SPECIAL if draw(one_in(6)) else (*SPECIAL, *EXTRA)
        config["added_tokens_decoder"] = {
            str(ids[text]): _object(text) | {"special": text != EXTRA[1]} for text in listed
        }
    if draw(sometimes):
        config["foo"] = None
    return config


@st.composite
def _special_maps(draw: st.DrawFn) -> dict[str, Any]:
    roles = zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True)
    result: dict[str, Any] = {}
    for role, text in roles:
        result |= _one(role, draw(_special(text)))
    if draw(sometimes):
        result["eos_token"] = EXTRA[0]
    return result


def _special(text: str) -> st.SearchStrategy[Any]:
    return st.sampled_from((text, text, _object(text), _object(text), "absent", None))


def _one(role: str, value: Any) -> dict[str, Any]:
    return {} if value == "absent" else {role: value}


def _object(text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": text, "special": True, **flags}
