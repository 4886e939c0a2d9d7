"""``tokenizer.model`` without a ``tokenizer.json``: ids of transformers' conversion and of SentencePiece."""

import base64

import pytest

from farshore.errors import InvalidRequest, ModelError
from farshore.models.tokenizer.hf import from_hf

from .made import TEXTS, folder_of, same_as_transformers, train_sentencepiece

LLAMA = dict(tokenizer_class="LlamaTokenizer")


@pytest.mark.parametrize("kind", ["llama", "mistral", None])
@pytest.mark.parametrize(
    "settings",
    [
        None,
        LLAMA,
        LLAMA | dict(add_bos_token=True, add_eos_token=True, legacy=True),
        LLAMA | dict(add_prefix_space=False, tokenizer_class="LlamaTokenizerFast", add_bos_token=True),
        dict(legacy=False, add_bos_token=True, eos_token="[INST]"),
        dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=None, add_bos_token=True),
        dict(extra_special_tokens=["<|more|>"], additional_special_tokens=["<|most|>"]),
        dict(
            added_tokens_decoder={
                "3": dict(content="[BEGIN]", special=True),
                "620": dict(content="<|new|>", normalized=True),
            }
        ),
    ],
)
def test_bpe_equals_transformers(pieces, tmp_path, kind, settings):
    same_as_transformers(folder_of(tmp_path, kind=kind, settings=settings, model=pieces.llama))


OPTIONS = [
    dict(model_type="unigram", byte_fallback=True),
    dict(model_type="unigram", normalization_rule_name="nmt_nfkc_cf", user_defined_symbols=["<|tool|>"]),
    dict(model_type="unigram", add_dummy_prefix=False, normalization_rule_name="identity"),
    dict(model_type="bpe", normalization_rule_name="nmt_nfkc"),
    dict(model_type="bpe", byte_fallback=True, vocab_size=620, add_dummy_prefix=False),
    dict(model_type="bpe", byte_fallback=True, vocab_size=620, remove_extra_whitespaces=False),
    dict(model_type="bpe", unk_id=2, bos_id=-1, eos_id=0, pad_id=1, control_symbols=["[INST]", "[/INST]"]),
    dict(model_type="bpe", unk_piece="[UNK]", bos_piece="[BOS]", eos_piece="[EOS]"),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("legacy", [True, False])
def test_general_conversion_equals_transformers(tmp_path, options, legacy):
    model = train_sentencepiece(tmp_path / "tokenizer.model", **options)
    settings = dict(legacy=legacy, add_bos_token=True)
    same_as_transformers(folder_of(tmp_path / "made", settings=settings, model=model))


@pytest.mark.parametrize("options", OPTIONS[:6])
def test_general_conversion_equals_sentencepiece(tmp_path, options):
    import sentencepiece

    model = train_sentencepiece(tmp_path / "tokenizer.model", **options)
    ours = from_hf(folder_of(tmp_path / "made", model=model), "here")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model))
    # To SentencePiece control pieces in a text are text, and U+0000 ends it; ``tokenizers`` normalises the
    # grapheme CR LF as one character.
    different = ("<s>", "<unk>", "\x00", "\r\n")
    for text in (text for text in TEXTS if not any(part in text for part in different)):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        if theirs.unk_id() not in ids:  # SentencePiece writes U+2047 for the unknown.
            assert ours.decode(ids) == theirs.decode(ids), text


def test_unigram_of_the_llama_class_is_refused(pieces, tmp_path):
    with pytest.raises(ModelError, match="which tokenizer_class LlamaTokenizer reads wrongly"):
        from_hf(folder_of(tmp_path, settings=LLAMA, model=pieces.unigram), "here")


def test_a_beginning_that_reads_as_a_pattern_is_refused(pieces, tmp_path):
    settings = dict(bos_token="a:b:c", add_bos_token=True)
    with pytest.raises(ModelError, match=r"tokenizer\.model: can't put 'a:b:c' around texts"):
        from_hf(folder_of(tmp_path, settings=settings, model=pieces.llama), "here")


@pytest.mark.parametrize("options", [dict(model_type="char"), dict(treat_whitespace_as_suffix=True)])
def test_other_kinds_are_refused(tmp_path, options):
    model = train_sentencepiece(tmp_path / "tokenizer.model", **options)
    with pytest.raises(ModelError, match="unsupported"):
        from_hf(folder_of(tmp_path / "made", model=model), "here")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\n".join(base64.b64encode(bytes([n])) + b" %d" % n for n in range(256)), "tiktoken vocabulary"),
        (b"", "not a SentencePiece model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "not a SentencePiece model"),
        (b"\x0a\xff\xff\xff\xff\x0f" + b"x" * 30, "not a SentencePiece model"),
    ],
)
def test_what_is_not_sentencepiece_is_refused(tmp_path, data, message):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ModelError, match=message):
        from_hf(tmp_path, "here")


def test_a_cut_file_is_refused(pieces, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(pieces.llama.read_bytes()[:1001])
    with pytest.raises(ModelError, match="not a SentencePiece model"):
        from_hf(tmp_path, "here")


def changed(pieces, folder, change):
    """A folder with the Unigram model after ``change(message)``."""
    from sentencepiece import sentencepiece_model_pb2

    message = sentencepiece_model_pb2.ModelProto.FromString(pieces.unigram.read_bytes())
    change(message)
    (folder / "tokenizer.model").write_bytes(message.SerializeToString())
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.trainer_spec, "unk_id", 10**6), "unk_id lies outside"),
        (lambda m: setattr(m.trainer_spec, "unk_id", -1), "unk_id lies outside"),
        (lambda m: setattr(m.pieces[9], "score", float("nan")), "score is not a number"),
        (lambda m: setattr(m.pieces[9], "piece", m.pieces[8].piece), "two pieces have the same text"),
        (lambda m: setattr(m.normalizer_spec, "precompiled_charsmap", b"x"), "normalisation map is damaged"),
        (lambda m: setattr(m.denormalizer_spec, "precompiled_charsmap", b"x"), "a denormaliser is unsupp"),
    ],
)
def test_damaged_values_are_refused(pieces, tmp_path, change, message):
    with pytest.raises(ModelError, match=message):
        from_hf(changed(pieces, tmp_path, change), "here")


def test_a_panic_of_the_library_is_a_refusal(pieces, tmp_path):
    """Tables that lead outside themselves are found only by use."""
    table = b"\x04\0\0\0" + b"abcdefgh"
    folder = changed(pieces, tmp_path, lambda m: setattr(m.normalizer_spec, "precompiled_charsmap", table))
    tokenizer = from_hf(folder, "here")
    with pytest.raises(InvalidRequest, match="can't encode this text: index out of bounds"):
        tokenizer.encode("text")


@pytest.mark.parametrize("name", ["tekken.json", "tekken_240911.json"])
def test_tekken_alone_is_refused(tmp_path, name):
    (tmp_path / name).write_text("{}")
    paths = [tmp_path / name, *([tmp_path] if name == "tekken.json" else [])]
    for path in paths:
        with pytest.raises(ModelError, match="Mistral's own format is unsupported; get the tokenizer"):
            from_hf(path, "here")
