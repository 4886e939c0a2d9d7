"""The demo model's tokenizer compared with transformers' one, and chat templates."""
# ruff: noqa: RUF001 - the texts are in many alphabets

import json
import random
import threading

import pytest
from tokenizers import pre_tokenizers

from farshore.errors import InvalidRequest, ModelError
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
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi <b>you</b> & me"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "日本"},
    ],
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
    assert folder.apply_chat(CHATS[0]) == ours.apply_chat(CHATS[0])


@pytest.mark.parametrize("prompt", [True, False])
def test_chat_equals_transformers(ours, theirs, prompt):
    for chat in CHATS:
        expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert ours.apply_chat(chat, prompt) == expected
        assert ours.encode_chat(chat, prompt) == theirs.encode(expected)


def in_folder(saved, tmp_path, template, **changes):
    (tmp_path / "tokenizer.json").write_bytes((saved / "tokenizer.json").read_bytes())
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>"} | changes
    if template is not None:
        config["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return from_hf(tmp_path, "here")


def test_template_helpers(saved, tmp_path):
    template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}{{ eos_token }}"
        "{{ strftime_now('%Y') | length }}"
    )
    got = in_folder(saved, tmp_path, template).apply_chat([{"content": "<é'>"}, {"a": 1}, {"b": 2}])
    assert got == '<|im_start|>{"content": "<é\'>"}{"a": 1}<|im_end|>4'


def test_named_templates_and_file_beside(saved, tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert in_folder(saved, tmp_path, named).apply_chat([]) == "D"
    (tmp_path / "chat_template.jinja").write_text("F")
    assert from_hf(tmp_path, "here").apply_chat([]) == "F"


def test_no_template(saved, tmp_path):
    with pytest.raises(ModelError, match="no chat template"):
        in_folder(saved, tmp_path, None).apply_chat([])


def test_template_errors(saved, tmp_path):
    with pytest.raises(ModelError, match="isn't valid Jinja"):
        in_folder(saved, tmp_path, "{% for %}")
    refusing = in_folder(saved, tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        refusing.apply_chat([])
    for nasty in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ messages[0]['x'] + 1 }}"):
        with pytest.raises(InvalidRequest):
            in_folder(saved, tmp_path, nasty).apply_chat([])


@pytest.mark.parametrize(
    "template",
    [
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",  # RecursionError
        "{{ '{7}'.format(1) }}",  # IndexError
        "{{ 'x' * (2 ** 62) }}",  # MemoryError
        "{{ '%d' % 'x' }}",
        "{{ 1 // 0 }}",
        "{{ range(10 ** 9) }}",
        "{{ raise_exception(messages[0]['content'] * 100000) }}",
        "{% include 'other' %}",
    ],
)
def test_every_exception_of_a_template_is_a_short_refusal(saved, tmp_path, template):
    with pytest.raises(InvalidRequest, match="can't render these messages") as refused:
        in_folder(saved, tmp_path, template).apply_chat([{"role": "user", "content": "Hello you"}])
    message = str(refused.value)
    assert len(message.removeprefix(str(tmp_path))) <= 200


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
