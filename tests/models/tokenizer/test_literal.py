"""Control tokens that are text: a clone of a tokenizer that knows them under private names only."""
# ruff: noqa: RUF001 - full-width letters

import re
import unicodedata

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from farshore.errors import InvalidRequest
from farshore.models.tokenizer.literal import LiteralEncoder

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["the </s> and <s> in a < / s > text", "<|im_end|>", "<|im_start|>user", "0123456789", "ünï ▁"] * 20
LLAMA3 = (
    r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(**model):
    """As Llama 3: byte-level BPE whose words are taken from the vocabulary before any merge."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = ["th", "the", "<|", "im", "|>", "Ġ<|"]
    merges = [("t", "h"), ("th", "e"), ("<", "|"), ("i", "m"), ("|", ">"), ("Ġ", "<|")]
    vocabulary = alphabet | {word: len(alphabet) + index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **model))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _with_specials_in_vocabulary():
    """As the demo model: the special tokens are words of the vocabulary too, before all others."""
    backend = _byte_level()
    words = SPECIALS + [word for word, _ in sorted(backend.get_vocab().items(), key=lambda item: item[1])]
    merges = [("t", "h"), ("<", "|"), ("i", "m"), ("<", "s"), ("<s", ">")]  # One of them makes <s>.
    words += [word for word in ("<s",) if word not in words]
    backend.model = models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges)
    return backend


def _sentencepiece_bpe(pre_tokenizer):
    """As Llama 2: merges make ``</s>`` and ``<s>`` of their characters."""
    letters = sorted(set("".join(CORPUS)) | set("abcdefghijklmnopqrstuvwxyz<>/|_ \n▁") - {" "})
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "</", "s>", "<s"]
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("<", "s>")]
    model = models.BPE(
        vocab={word: index for index, word in enumerate(words)},
        merges=merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    backend = tokenizers.Tokenizer(model)
    if pre_tokenizer:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _unigram():
    """As T5: the control tokens are words of the vocabulary with the best score; NFKC."""
    letters = sorted(set("".join(CORPUS)) | set("abcdefghijklmnopqrstuvwxyz<>/|_\n▁") - {" "})
    scored = [
        ("<unk>", 0.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        *((letter, -5.0) for letter in letters),
        ("</", -6.0),
    ]
    backend = tokenizers.Tokenizer(models.Unigram(scored, unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    backend.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    return backend


MAKERS = {
    "byte-level": _byte_level,
    "byte-level with ignore_merges": lambda: _byte_level(ignore_merges=True),
    "specials in the vocabulary": _with_specials_in_vocabulary,
    "SentencePiece BPE": lambda: _sentencepiece_bpe(True),
    "SentencePiece BPE, legacy": lambda: _sentencepiece_bpe(False),
    "Unigram": _unigram,
}


def _with_added(backend):
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIALS])
    backend.add_tokens([AddedToken("<think>", normalized=False), "<tool>"])
    return backend


def _make(name):
    backend = _with_added(MAKERS[name]())
    added = backend.get_added_tokens_decoder()
    controls = {entry.content: token for token, entry in added.items() if entry.special}
    return backend, controls, LiteralEncoder(backend, controls.values())


@pytest.fixture(scope="module", params=MAKERS)
def made(request):
    """(the tokenizer, the ids of its control tokens by text, its LiteralEncoder)."""
    return _make(request.param)


def _named(text, encoder):
    """``text`` with all its control tokens named."""
    return re.sub("|".join(map(re.escape, encoder.names)), lambda found: encoder.names[found[0]], text)


_pieces = st.sampled_from(
    [*SPECIALS, "<think>", "<tool>", " ", "\n", "  ", "<", "</", "s>", ">", "the", "ü", "東"]
)
# NFKC must make no piece of a control token of a letter: the tokenizer would take it for one.
_letters = st.characters(exclude_categories=["Cs"]).filter(
    lambda letter: letter in "<>/|s" or not set(unicodedata.normalize("NFKC", letter)) & set("<>/|s")
)
texts = st.lists(_pieces | st.text(_letters, max_size=4), max_size=12).map("".join)


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_named_tokens_get_the_ids_of_the_tokenizer(made, text):
    backend, _, encoder = made
    expected = backend.encode(text, add_special_tokens=False).ids
    assert encoder.encode(_named(text, encoder)) == expected


@settings(max_examples=100, deadline=None)
@given(before=texts, typed=st.sampled_from(SPECIALS), after=texts)
def test_typed_tokens_are_text(made, before, typed, after):
    backend, controls, encoder = made
    before, after = (re.sub(r"[<>|/]", "", text) for text in (before, after))
    text = f"{before}{typed}{after}"
    ids = encoder.encode(encoder.names["<s>"] + text + encoder.names["</s>"])
    inside = ids[1:-1]
    assert (ids[0], ids[-1]) == (controls["<s>"], controls["</s>"])
    assert not set(inside) & set(controls.values())
    plain = backend.decode(ids, skip_special_tokens=False)
    if isinstance(backend.decoder, decoders.ByteLevel):
        assert plain == f"<s>{text}</s>"
        return
    # SentencePiece adds a blank behind each special token, and unknown letters have no text.
    whole = backend.decode(backend.encode(f"<s>{text}</s>").ids, skip_special_tokens=False)
    assert plain.replace(" ", "") == whole.replace(" ", "")


@pytest.mark.parametrize("name", ["byte-level", "byte-level with ignore_merges"])
def test_typed_tokens_have_the_ids_of_transformers(name):
    """transformers has a switch that makes all special tokens text: a whole text of a user's is the same."""
    backend, _, encoder = _make(name)
    text = "a<|im_end|>\n<|im_start|>the <s></s>!<think>"
    backend.encode_special_tokens = True
    assert encoder.encode(text) == backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", ["SentencePiece BPE", "Unigram"])
def test_a_word_of_the_vocabulary_is_not_matched(name):
    backend, controls, encoder = _make(name)
    backend.encode_special_tokens = True
    assert controls["</s>"] in backend.encode("a</s>b", add_special_tokens=False).ids  # The model alone.
    ids = encoder.encode("a</s>b" + encoder.names["</s>"])
    assert ids.count(controls["</s>"]) == 1 and ids[-1] == controls["</s>"]
    assert backend.decode(ids[:-1], skip_special_tokens=False) == "a</s>b"


def test_full_width_letters_make_no_control_token():
    backend, controls, encoder = _make("Unigram")
    assert encoder.count(backend.encode("a＜/s＞").ids) == 1
    assert controls["</s>"] not in encoder.encode("a＜/s＞")


def test_unknown_text_is_no_control_token():
    """The unknown token is special, and the model makes it of text."""
    backend = _unigram()
    backend.add_special_tokens(["<unk>", "</s>"])
    encoder = LiteralEncoder(backend, [0, 2])
    ids = encoder.encode("東<unk>" + encoder.names["</s>"])
    assert ids == [backend.token_to_id("▁"), 0, *ids[2:-1], 2] and 0 not in ids[2:]
    assert encoder.count([0, 0, 2]) == 1


def test_a_model_that_knows_no_unknown_token():
    backend = tokenizers.Tokenizer(models.Unigram([("a", 0.0), ("</s>", 0.0)]))
    backend.add_special_tokens([AddedToken("</s>", normalized=False)])
    encoder = LiteralEncoder(backend, [1])
    assert encoder.encode("a" + encoder.names["</s>"]) == [0, 1]
    with pytest.raises(InvalidRequest, match="can't encode this text: Encountered an unknown token"):
        encoder.encode("b")


def test_ids_with_gaps():
    """A tokenizer's new tokens begin at the number of its words, which may be another word's id."""
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 5, "c": 6, "</s>": 9}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["</s>"])
    encoder = LiteralEncoder(backend, [9])
    assert encoder.encode(f"b c {encoder.names['</s>']} b") == [5, 6, 9, 5]


def test_what_can_not_be_text_is_refused():
    """A word that a model finds only beside another one can't be foreseen."""
    vocabulary = {"x": 0, "y": 1, "z": 2, "yz": 3, "xyz": 4, "xy": 5}
    merges = [("x", "y"), ("xy", "z")]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.normalizer = normalizers.Replace("q", "xyz")
    backend.add_special_tokens([AddedToken("xyz", normalized=False)])
    encoder = LiteralEncoder(backend, [4])
    assert encoder.encode("xyz") == [5, 2]
    assert encoder.encode("q") == [5, 2]


def test_a_control_token_that_the_model_makes_is_refused(monkeypatch):
    monkeypatch.setattr(LiteralEncoder, "_divide_vocabulary_words", lambda self: None)
    _, _, encoder = _make("Unigram")
    with pytest.raises(InvalidRequest, match="makes the control token '</s>' of the messages' text"):
        encoder.encode("a</s>")
