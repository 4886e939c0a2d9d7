"""Hugging Face folders with a ``tokenizer.json``: ids and special tokens of transformers' AutoTokenizer."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models

from farshore.errors import InvalidRequest, ModelError
from farshore.models.files.source import ModelSource
from farshore.models.tokenizer.hf import from_hf
from farshore.models.tokenizer.load import load_tokenizer

from .made import TEXTS, folder_of, same_as_transformers

CLASSES = [
    None,
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "PreTrainedTokenizerFast",
    "PreTrainedTokenizer",
    "TokenizersBackend",
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "Qwen2Tokenizer",
    "GPTNeoXTokenizerFast",
]


@pytest.mark.parametrize("kind", ["llama", "mistral", None])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("form", ["byte_level", "pieces_json"])
def test_classes_equal_transformers(request, tmp_path, form, name, kind):
    """Also a class that doesn't fit the vocabulary: transformers takes it at its word."""
    settings = None if name is None else dict(tokenizer_class=name)
    file = request.getfixturevalue(form)
    same_as_transformers(folder_of(tmp_path, kind=kind, settings=settings, tokenizer=file))


@pytest.mark.parametrize(
    "name", ["LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"]
)
@pytest.mark.parametrize(
    "options",
    [
        dict(add_bos_token=False, add_eos_token=True),  # Ignored: the file's post-processor counts.
        dict(add_prefix_space=True, legacy=True),
        dict(add_prefix_space=False, legacy=None),
        dict(clean_up_tokenization_spaces=True, model_max_length=8),
        dict(split_special_tokens=True),
        dict(bos_token=None, eos_token="<|im_end|>", pad_token="<|pad|>", unk_token="<unk>"),
        dict(eos_token={"__type": "AddedToken", "content": "fox", "lstrip": True, "normalized": False}),
        dict(extra_special_tokens=["<|tool|>", "dog"], image_token="<|image|>"),
        dict(
            extra_special_tokens={"boi_token": "<|boi|>", "eoi_token": "é"},
            additional_special_tokens=["<|tool|>"],
            image_token="<|image|>",
            audio_token={"__type": "AddedToken", "content": "<|boi|>", "single_word": True},
        ),
        dict(additional_special_tokens=["<|tool|>"], extra_special_tokens=[]),
        dict(
            added_tokens_decoder={
                "0": dict(content="<s>", special=True, normalized=False),
                "2000": dict(content="<|tool|>", special=False, rstrip=True),
                "1000": dict(content="six", special=False, single_word=True, lstrip=True),
            },
            bos_token="<s>",
            eos_token="six",
        ),
    ],
)
@pytest.mark.parametrize("form", ["byte_level", "pieces_json"])
def test_settings_equal_transformers(request, tmp_path, form, name, options):
    settings = dict(tokenizer_class=name) | options
    same_as_transformers(folder_of(tmp_path, settings=settings, tokenizer=request.getfixturevalue(form)))


OLD = dict(
    special_tokens_map=dict(
        bos_token="<s>",
        eos_token=dict(content="</s>", lstrip=False, normalized=False, rstrip=False, single_word=False),
        unk_token="<unk>",
        pad_token="</s>",
        image_token="quick",
        additional_special_tokens=["<|tool|>"],
    ),
    added_tokens={"<|tool|>": 1000, "six": 1001},
)


@pytest.mark.parametrize("name", ["LlamaTokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("form", ["byte_level", "pieces_json", "pieces"])
def test_old_files_equal_transformers(request, tmp_path, form, name, listed):
    """They count only where tokenizer_config.json lists no added tokens."""
    made = request.getfixturevalue(form)
    settings = dict(
        tokenizer_class=name, add_bos_token=True, bos_token="fox", sep_token="dog", image_token="lazy"
    )
    if listed:
        settings["added_tokens_decoder"] = {"1": dict(content="</s>", special=True)}
    if form == "pieces":
        made = made.llama
    folder = folder_of(tmp_path, settings=settings, tokenizer=made, **OLD)
    if form == "pieces" and name == "GPT2Tokenizer":
        with pytest.raises(ModelError, match="GPT2Tokenizer doesn't read SentencePiece"):
            from_hf(folder, "here")
    else:
        same_as_transformers(folder)


@pytest.mark.parametrize("name", ["LlamaTokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_truncation_and_padding_of_the_file_do_not_change_prompts(byte_level, pieces_json, tmp_path, name):
    for number, source in enumerate((byte_level, pieces_json)):
        backend = tokenizers.Tokenizer.from_file(str(source))
        backend.enable_truncation(max_length=16)
        backend.enable_padding(length=64)
        folder = folder_of(tmp_path / str(number), settings=dict(tokenizer_class=name))
        backend.save(str(folder / "tokenizer.json"))
        ours, _ = same_as_transformers(folder)
        assert len(ours.encode(TEXTS[0] * 5)) > 64


def test_class_of_the_model_configuration(byte_level, pieces_json, tmp_path):
    """config.json names the class where tokenizer_config.json doesn't."""
    for number, source in enumerate((byte_level, pieces_json)):
        folder = folder_of(tmp_path / str(number), tokenizer=source)
        (folder / "config.json").write_text(
            json.dumps(dict(model_type="llama", tokenizer_class="GPT2Tokenizer"))
        )
        same_as_transformers(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(tokenizer_class="BertTokenizer"), "tokenizer_class 'BertTokenizer' is unsupported; supported"),
        (dict(tokenizer_class="MyOwn", auto_map={"AutoTokenizer": [None, "m.T"]}), "'MyOwn' is unsupported"),
        (dict(auto_map=["m.T", None]), "needs code from the folder"),
        (dict(fast_tokenizer_files=["tokenizer.json", "tokenizer.4.0.json"]), "fast_tokenizer_files"),
        (dict(fix_mistral_regex=True), "fix_mistral_regex is unsupported"),
        (dict(bos_token=7), "'bos_token' doesn't name tokens"),
        (dict(extra_special_tokens="<s>"), "'extra_special_tokens' doesn't name tokens"),
        (dict(added_tokens_decoder={"x": {"content": "a"}}), "'added_tokens_decoder' doesn't name tokens"),
        (dict(added_tokens_decoder={"1": {"contents": "a"}}), "'added_tokens_decoder' doesn't name tokens"),
    ],
)
def test_refused_by_name(byte_level, tmp_path, settings, message):
    with pytest.raises(ModelError, match=message) as caught:
        from_hf(folder_of(tmp_path, settings=settings, tokenizer=byte_level), "here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_known_class_counts_before_own_code(pieces_json, tmp_path, kind):
    settings = dict(tokenizer_class="LlamaTokenizerFast", auto_map={"AutoTokenizer": ["m.T", None]})
    same_as_transformers(folder_of(tmp_path, kind=kind, settings=settings, tokenizer=pieces_json))


def test_other_model_types_are_refused(byte_level, tmp_path):
    with pytest.raises(ModelError, match="a model of type 'bert' is unsupported"):
        from_hf(folder_of(tmp_path, kind="bert", tokenizer=byte_level), "here")


def test_clean_up_is_refused_where_transformers_does_it(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, ".": 1}, unk_token="a"))
    folder = folder_of(tmp_path, settings=dict(clean_up_tokenization_spaces=True))
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(ModelError, match="clean_up_tokenization_spaces deletes blanks"):
        from_hf(folder, "here")
    (folder / "tokenizer_config.json").unlink()
    ours, _ = same_as_transformers(folder, texts=[])
    stream = ours.stream()
    assert [stream.push(token) for token in (0, 1)] == ["a", " ."]


def test_text_without_tokens_is_refused(tmp_path):
    backend = tokenizers.Tokenizer(models.BPE({"a": 0}, [], unk_token="<unk>"))
    backend.save(str(folder_of(tmp_path) / "tokenizer.json"))
    tokenizer = from_hf(tmp_path, "here")
    assert tokenizer.encode("aa") == [0, 0]
    with pytest.raises(InvalidRequest, match="here: its tokenizer can't encode this text: Unk token"):
        tokenizer.encode("ab")


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.CTC(),
        decoders.BPEDecoder(),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.Replace(tokenizers.Regex("a|b"), " ")]),
    ],
)
def test_decoders_that_streams_cannot_follow_are_refused(byte_level, tmp_path, decoder):
    backend = tokenizers.Tokenizer.from_file(str(byte_level))
    backend.decoder = decoder
    backend.save(str(folder_of(tmp_path) / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"decoder [\w+]+ is unsupported; supported: ByteLevel"):
        from_hf(tmp_path, "here")


def test_unigram_of_a_named_class_is_refused(pieces, tmp_path):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder_of(tmp_path / "from", model=pieces.unigram)).save_pretrained(
        tmp_path
    )
    same_as_transformers(tmp_path)
    folder_of(tmp_path, settings=dict(tokenizer_class="LlamaTokenizer"))
    with pytest.raises(ModelError, match="LlamaTokenizer needs a BPE model"):
        from_hf(tmp_path, "here")


def test_a_damaged_template_file_is_refused(byte_level, tmp_path):
    folder = folder_of(tmp_path, tokenizer=byte_level)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"chat_template\.jinja: can't be read as UTF-8 text"):
        from_hf(folder, "here")


def test_a_tokenizer_file_by_itself(byte_level, pieces_json):
    from transformers import PreTrainedTokenizerFast

    for file in (byte_level, pieces_json):
        ours = load_tokenizer(ModelSource(str(file), file, "hf"))
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(file))
        for text in TEXTS:
            assert ours.encode(text) == theirs.encode(text)
        assert (ours.eos_ids, ours.chat_template, dict(ours.special_tokens)) == ((), None, {})


def test_a_sentencepiece_file_by_itself(pieces, tmp_path):
    for file in (pieces.llama, pieces.unigram):
        ours = load_tokenizer(ModelSource(str(file), file, "hf"))
        folder = folder_of(tmp_path / file.parent.name, kind=None, model=file)
        theirs, _ = same_as_transformers(folder)
        assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
        assert ours.eos_ids == theirs.eos_ids and ours.special_tokens == theirs.special_tokens


@pytest.mark.parametrize(
    "layout",
    [
        dict(inline="I"),
        dict(inline=[dict(name="tool_use", template="T"), dict(name="default", template="D")]),
        dict(inline=[dict(name="tool_use", template="T")]),
        dict(inline="I", file="F"),
        dict(inline="I", more=dict(tool_use="M")),
        dict(inline="I", file="F", more=dict(tool_use="M")),
        dict(file="F", more=dict(default="E")),
        dict(more=dict(default="E")),
        dict(),
    ],
)
def test_place_of_the_chat_template(byte_level, tmp_path, layout):
    settings = dict(chat_template=layout["inline"]) if "inline" in layout else {}
    folder = folder_of(tmp_path, settings=settings, tokenizer=byte_level)
    if "file" in layout:
        (folder / "chat_template.jinja").write_text(layout["file"])
    for name, text in layout.get("more", {}).items():
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    ours, theirs = same_as_transformers(folder, texts=[])
    found = {"default": ours.chat_template} if isinstance(ours.chat_template, str) else ours.chat_template
    expected = theirs.chat_template
    assert found == ({"default": expected} if isinstance(expected, str) else expected)


@pytest.mark.parametrize(
    "template", ["{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}"]
)
def test_a_chat_has_the_bos_that_its_template_writes(byte_level, tmp_path, chat_ids, template):
    settings = dict(chat_template=template, bos_token="<s>", eos_token="</s>")
    ours, theirs = same_as_transformers(folder_of(tmp_path, settings=settings, tokenizer=byte_level))
    messages = [dict(role="user", content="What is it?")]
    expected = theirs.apply_chat_template(messages, return_dict=False)
    assert chat_ids(ours, messages) == expected
    assert expected.count(0) == template.count("bos_token")
