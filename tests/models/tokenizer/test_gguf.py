"""A GGUF file's tokenizer metadata: defaults, special tokens, ends of an answer, and refusals by name."""
# ruff: noqa: RUF001 - DeepSeek's special tokens have fullwidth bars

import struct

import gguf
import pytest
import torch

from farshore.errors import ModelError
from farshore.models.files.gguf import GgufFile
from farshore.models.files.gguf_header import GgufHeader
from farshore.models.files.source import ModelSource
from farshore.models.tokenizer import gguf as gguf_tokenizer
from farshore.models.tokenizer.load import load_tokenizer
from farshore.models.weights.load import load_model

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = {
    "model": "gpt2",
    "pre": "smollm",
    "tokens": ["<s>", "a", "b", "ab", "</s>", "!"],
    "token_type": [CONTROL, NORMAL, NORMAL, NORMAL, CONTROL, NORMAL],
    "merges": ["a b"],
    "bos_token_id": 0,
    "eos_token_id": 4,
}
SPM = {
    "model": "llama",
    "tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab", "▁", "▁ab", "<", ">", "s", "<s", "s>"],
    "token_type": [UNKNOWN, CONTROL, CONTROL, *[NORMAL] * 10],
    "scores": [0.0, 0.0, 0.0, -4.0, -5.0, -1.0, -6.0, -2.0, -7.0, -8.0, -9.0, -2.5, -2.7],
}


def header(tmp_path, metadata):
    return GgufFile(tmp_path / "m.gguf", b"", GgufHeader(metadata, {}))


def build(tmp_path, base=BPE, **changes):
    """The tokenizer of ``base`` with some keys changed; None removes one."""
    metadata = {
        f"tokenizer.ggml.{key}": value for key, value in (base | changes).items() if value is not None
    }
    return gguf_tokenizer.from_gguf(header(tmp_path, metadata), "m")


def with_tokens(tmp_path, *more, base=BPE, **changes):
    """The tokenizer with ``more`` tokens, each (text, type), after those of ``base``."""
    texts, types = zip(*more, strict=True)
    tokens, kinds = [*base["tokens"], *texts], [*base["token_type"], *types]
    return build(tmp_path, base, tokens=tokens, token_type=kinds, **changes)


@pytest.mark.parametrize(
    ("pre", "adds"),
    [
        ("smollm", False),
        ("gpt-2", False),
        ("qwen2", False),
        ("llama-bpe", True),
        ("llama3", True),
        ("tekken", True),
    ],
)
def test_beginning_of_text_is_added_by_default_as_llama_cpp_does(tmp_path, pre, adds):
    assert build(tmp_path, pre=pre).encode("ab") == [0, 3][not adds :]
    assert build(tmp_path, pre=pre, add_bos_token=True).encode("ab") == [0, 3]
    assert build(tmp_path, pre=pre, add_bos_token=False).encode("ab") == [3]
    assert build(tmp_path, pre=pre).encode("ab", add_special_tokens=False) == [3]
    assert build(tmp_path, pre=pre, add_bos_token=False).encode("<s>ab") == [0, 3]


def test_end_of_text_is_added_if_the_file_says_so(tmp_path):
    assert build(tmp_path, add_eos_token=True).encode("ab") == [3, 4]
    both = build(tmp_path, add_eos_token=True, add_bos_token=True)
    assert both.encode("ab") == [0, 3, 4]
    assert both.encode("") == [0, 4]
    assert both.decode([0, 3, 4]) == "ab"
    same = build(tmp_path, add_eos_token=True, add_bos_token=True, eos_token_id=0)
    assert same.encode("ab") == [0, 3, 0]


def test_sentencepiece_defaults(tmp_path):
    """Begins with <s>, by the usual ids if the file names none, and with a blank."""
    tokenizer = build(tmp_path, SPM)
    assert tokenizer.encode("ab") == [1, 7]
    assert tokenizer.encode("ab c") == [1, 7, 6, 0]
    assert tokenizer.eos_ids == (2,)
    assert tokenizer.decode([1, 7, 6, 3]) == "ab a"
    assert build(tmp_path, SPM, add_bos_token=False, add_space_prefix=False).encode("ab") == [5]


def test_text_never_merges_to_a_control_piece(tmp_path):
    """Though <, s and > are pieces, and <s> has the best score. This shows where special tokens stay text."""
    tokenizer = build(tmp_path, SPM, add_space_prefix=False, add_bos_token=False)
    assert tokenizer.encode("<s>") == [1]
    tokenizer._backend.encode_special_tokens = True
    assert tokenizer.encode("<s>") == [11, 9]


def test_tokens_of_roles_are_special_whatever_their_type(tmp_path):
    """Files of 2023 call all tokens normal. Padding is often a normal token's id, and stays one."""
    tokenizer = build(tmp_path, token_type=None, padding_token_id=5)
    assert tokenizer.encode("<s>ab!") == [0, 3, 5]
    assert tokenizer.decode([0, 3, 5, 4]) == "ab!"
    unused = with_tokens(tmp_path, ("<pad>", UNUSED), padding_token_id=6)
    assert unused.decode([3, 6]) == "ab"
    ids = dict(bos_token_id=1, eos_token_id=2, unknown_token_id=0)
    spm = build(tmp_path, SPM, token_type=None, **ids)
    assert spm.encode("ab c<unk>") == build(tmp_path, SPM).encode("ab c<unk>") == [1, 7, 6, 0, 0]


def test_user_defined_tokens_stay_whole_and_are_text(tmp_path):
    tokenizer = with_tokens(tmp_path, ("a\n  b", USER_DEFINED), ("<｜User｜>", CONTROL))
    assert tokenizer.encode("ba\n  b<｜User｜>") == [2, 6, 7]
    assert tokenizer.decode([2, 6, 7]) == "ba\n  b"


def test_padding_of_the_vocabulary_is_no_text(tmp_path):
    tokenizer = with_tokens(tmp_path, ("[PAD6]", UNUSED), ("[PAD7]", UNUSED))
    assert tokenizer.vocab_size == 8
    assert tokenizer.encode("a[PAD6]b") == [1, 2]


def test_a_merge_may_begin_with_a_blank(tmp_path):
    tokenizer = with_tokens(tmp_path, (" ", NORMAL), (" a", NORMAL), merges=["a b", "  a"])
    assert tokenizer.encode("ab") == [3]


ENDS = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "<｜end▁of▁sentence｜>",
]


@pytest.mark.parametrize("text", ENDS)
def test_known_ends_of_a_turn_end_an_answer(tmp_path, text):
    assert with_tokens(tmp_path, (text, CONTROL)).eos_ids == (4, 6)
    assert with_tokens(tmp_path, (text, USER_DEFINED)).eos_ids == (4, 6)
    assert with_tokens(tmp_path, (text, NORMAL)).eos_ids == (4,)
    assert with_tokens(tmp_path, (text, CONTROL), eos_token_id=6).eos_ids == (6,)


def test_other_ends(tmp_path):
    no_ends = [("<|fim_pad|>", CONTROL), ("<|file_sep|>", CONTROL), ("<|im_start|>", CONTROL)]
    assert with_tokens(tmp_path, *no_ends).eos_ids == (4,)
    named = with_tokens(tmp_path, *no_ends, eot_token_id=8, eom_token_id=7)
    assert named.eos_ids == (4, 8, 7)
    harmony = [("<|return|>", CONTROL), ("<|call|>", CONTROL), ("<|end|>", CONTROL)]
    assert with_tokens(tmp_path, *harmony).eos_ids == (4, 6, 7)
    assert with_tokens(tmp_path, *harmony[1:]).eos_ids == (4, 6, 7)
    assert build(tmp_path, eos_token_id=None).eos_ids == ()


def test_the_template_of_a_chat_names_the_files_tokens(tmp_path, chat_ids):
    metadata = {f"tokenizer.ggml.{key}": value for key, value in BPE.items()}
    metadata["tokenizer.chat_template"] = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    tokenizer = gguf_tokenizer.from_gguf(header(tmp_path, metadata), "m")
    assert chat_ids(tokenizer, [{"role": "user", "content": "ab"}]) == [0, 3, 4]
    metadata["tokenizer.chat_template"] = 7
    with pytest.raises(ModelError, match="chat_template isn't a text"):
        gguf_tokenizer.from_gguf(header(tmp_path, metadata), "m")


@pytest.mark.heavy
def test_an_answer_stops_at_the_end_that_only_the_template_names(demo, forward, tmp_path, chat_ids):
    """The demo's file, changed to say that <|endoftext|> ends a text. Its answers end with <|im_end|>."""
    content = bytearray(demo.path.read_bytes())
    key = b"tokenizer.ggml.eos_token_id" + struct.pack("<I", gguf.GGUFValueType.UINT32)
    place = content.index(key) + len(key)
    assert struct.unpack_from("<I", content, place) == (2,)
    struct.pack_into("<I", content, place, 0)
    (tmp_path / "m.gguf").write_bytes(content)
    source = ModelSource("changed", tmp_path / "m.gguf", "gguf")
    model, tokenizer = load_model(source, dtype=torch.float32), load_tokenizer(source)
    assert tokenizer.eos_ids == (0, 2)
    ids = chat_ids(tokenizer, [{"role": "user", "content": "What is the capital of France?"}])
    prompt_tokens = len(ids)
    with torch.inference_mode():
        while ids[-1] not in tokenizer.eos_ids or len(ids) == prompt_tokens:
            assert len(ids) < prompt_tokens + 20
            ids.append(int(forward(model, ids)[-1].argmax()))
    assert tokenizer.decode(ids[prompt_tokens:]) == "The capital of France is Paris."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model="t5"), "tokenizer 't5' of architecture 'None' is unsupported; supported: 'llama'"),
        (dict(model="bert"), "tokenizer 'bert'.* give the model's Hugging Face directory"),
        (dict(pre="falcon"), "'gpt2' with split 'falcon' is unsupported; .*llama-bpe, .*tekken;"),
        (dict(pre="default"), "unsupported"),
        (dict(pre=None), "unsupported"),
        (dict(pre=["smollm"]), "unsupported"),
        (dict(bos_token_id=6), "outside the vocabulary"),
        (dict(eot_token_id=-1), "outside the vocabulary"),
        (dict(eos_token_id=1.0), "outside the vocabulary"),
        (dict(merges=["a z"]), "merges don't fit"),
        (dict(merges=["a"]), "merges don't fit"),
        (dict(merges=["ab"], tokens=["<s>", "a", "b", "ab", "</s>", "aab"]), "merges don't fit"),
        (dict(merges=7), "list of texts"),
        (dict(merges=None), "merges' is missing"),
        (dict(tokens=[1, 2]), "list of texts"),
        (dict(tokens=["a", "b", "ab", "a", "c", "d"]), "two tokens have the same text"),
        (dict(token_type=[1, 1]), "token_type isn't a list of 6 numbers"),
        (dict(token_type=["1"] * 6), "token_type isn't a list of 6 numbers"),
        (dict(add_bos_token=1), "add_bos_token isn't true or false"),
        (dict(add_bos_token=True, bos_token_id=None), "adds the bos_token .*no tokenizer.ggml.bos_token_id"),
        (dict(add_eos_token=True, eos_token_id=None), "adds the eos_token"),
    ],
)
def test_refused(tmp_path, changes, message):
    with pytest.raises(ModelError, match=message) as caught:
        build(tmp_path, **changes)
    assert "m.gguf: " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(scores=None), "scores' is missing; convert the model again"),
        (dict(scores=[0.0]), "scores isn't a list of 13 numbers"),
        (dict(scores=["0"] * 13), "scores isn't a list of 13 numbers"),
        (dict(scores=[float("nan")] * 13), "scores isn't a list of 13 numbers"),
        (dict(scores=[-1000.0] * 13), "same score.*tokenizer.model beside it"),
        (dict(precompiled_charsmap=[1, 2]), "precompiled_charsmap is unsupported"),
        (dict(remove_extra_whitespaces=True), "remove_extra_whitespaces is unsupported"),
        (dict(token_type=[NORMAL] * 13), "no token spells unknown characters"),
        (dict(add_space_prefix=0), "add_space_prefix isn't true or false"),
    ],
)
def test_sentencepiece_refused(tmp_path, changes, message):
    with pytest.raises(ModelError, match=message) as caught:
        build(tmp_path, SPM, **changes)
    assert "\n" not in str(caught.value)


def test_sentencepiece_of_other_families_is_refused(tmp_path):
    metadata = {f"tokenizer.ggml.{key}": value for key, value in SPM.items()}
    with pytest.raises(ModelError, match="'llama' of architecture 'gemma2' is unsupported"):
        gguf_tokenizer.from_gguf(header(tmp_path, metadata | {"general.architecture": "gemma2"}), "m")
