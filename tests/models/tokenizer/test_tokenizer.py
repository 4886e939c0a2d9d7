"""The demo model's tokenizer compared with transformers' one."""
# ruff: noqa: RUF001 - the texts are in many alphabets

import random
import threading

import pytest
from tokenizers import pre_tokenizers

from farshore.errors import ModelError
from farshore.models.files.source import ModelSource
from farshore.models.tokenizer.hf import from_hf
from farshore.models.tokenizer.load import load_tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "What is the capital of France?",
    "日本語のテキスト、中文文本，한국어 텍스트",
    "Привет, мир! Γειά σου Κόσμε. مرحبا بالعالم שלום हिन्दी ไทย",
    "def f(x):\n    return {k: v**2 for k, v in x.items() if v >= 10}\n\n\n\tpass  # 100%\r\n",
    "3.14159 2024-01-02 1,000,000 0x1F ½ ² Ⅷ ٣٤ 10 100   7 \n\n1. one\n\n2. two",
    "👩‍👩‍👧‍👦 🏳️‍🌈 😀😀 e\u0301 \u00e9 z\u0335a\u0334lgo\u0336",
    "  leading, trailing  \t\n \n\n   ",
    "it's we'll they've I'M don't 'quoted'",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>x<|im_start|> <|im_no|> <|im_end|>",
    "\x00\x01\x7f\u200b\ufeff\ufffd\u2028",
    "a" * 300 + "\n" * 20 + "=" * 50,
]


@pytest.fixture(scope="session")
def theirs(demo):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(demo.path.parent, gguf_file=demo.path.name)
    # The split of SmolLM2's tokenizer.json and of llama.cpp. transformers reads GPT-2's split from GGUF.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return theirs


@pytest.fixture(scope="session")
def saved(theirs, tmp_path_factory):
    """The demo's tokenizer as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("saved")
    theirs.save_pretrained(folder)
    return folder


def test_ids_equal_transformers(ours, theirs):
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text


def test_random_text_equals_transformers(ours, theirs):
    rng = random.Random(7)
    pool = [c for text in TEXTS for c in text] + [chr(n) for n in (*range(32, 127), *range(0x4E00, 0x4E40))]
    for _ in range(300):
        text = "".join(rng.choices(pool, k=rng.randrange(1, 60)))
        assert ours.encode(text) == theirs.encode(text), text


def test_decode_equals_transformers_and_round_trips(ours, theirs):
    for text in TEXTS:
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        if "<|im_end|>" not in text:
            assert ours.decode(ids) == text


def test_folder_equals_gguf(ours, saved):
    folder = from_hf(saved, "saved")
    for text in TEXTS:
        assert folder.encode(text) == ours.encode(text)
    assert folder.eos_ids == (2,)
    assert ours.eos_ids == (2, 0)  # GGUF: known ends of a turn, <|endoftext|> here, as in llama.cpp
    assert folder.chat_template == {"default": ours.chat_template}


def test_long_texts_leave_the_interpreter_to_others(ours):
    """Another thread keeps running while a million characters are encoded, which takes most of a second."""
    text, ids, passes = "word " * 200_000, [], 0
    encoding = threading.Thread(target=lambda: ids.extend(ours.encode(text)))
    encoding.start()
    while encoding.is_alive():
        passes += 1
        encoding.join(0.001)
    assert len(ids) >= 200_000
    # If encoding held the interpreter's lock, there would be a few passes, before and after it.
    assert passes > 20


def test_damaged_folder(tmp_path):
    with pytest.raises(ModelError, match=r"no tokenizer\.json or"):
        from_hf(tmp_path, "here")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="not a readable tokenizer"):
        load_tokenizer(ModelSource("here", tmp_path, "hf"))
