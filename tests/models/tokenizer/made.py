"""Texts, small tokenizers and folders for these tests, and the comparison with transformers."""
# ruff: noqa: RUF001 - the texts are in many alphabets

import io
import json
import shutil
from pathlib import Path

from farshore.models.tokenizer.hf import from_hf
from farshore.models.tokenizer.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.",
    "What is the capital of France? Paris is the capital of France.",
    "It's we'll they've I'm don't can't; 3.14159 and 1,000,000 or 2024-01-02.",
    "def f(x):\n    return {k: v for k, v in x.items() if v >= 10}\n\n\tpass",
    "Привет, мир! Γειά σου Κόσμε. naïve café Straße",
    "日本語のテキスト、中文文本，한국어 텍스트 مرحبا हिन्दी ไทย",
    "👩‍👩‍👧‍👦 😀 🌍 e\u0301 ½ ﬁ Ａ ①",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "   two  blanks   and three   ",
    "\n\n leading newline\r\n\t",
    "▁a ▁▁b▁ <0x41><unk>",
    "<s>one</s> two <s> three<|tool|>four <|tool|> five [INST] six[/INST]",
    "\x00\x01\x7f\u200b\ufeff\ufffd\u2028",
    "אבג unseen 🦜 ꙮ letters",
    "a" * 70 + "=" * 30,
]


def same_as_transformers(folder: Path, *, texts: list[str] = TEXTS) -> tuple[Tokenizer, object]:
    """Asserts that ours equals transformers' AutoTokenizer; returns both."""
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder), from_hf(folder, "here")
    for text in texts:
        for special in (True, False):
            expected = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == expected, text
        ids = theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    assert dict(ours.special_tokens) == theirs.special_tokens_map
    assert ours.eos_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    return ours, theirs


def train_sentencepiece(path: Path, **options) -> Path:
    """Writes a small SentencePiece model. ``options``: of SentencePieceTrainer."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_writer=written,
        **dict(vocab_size=420, hard_vocab_limit=False, minloglevel=2, num_threads=1) | options,
    )
    path.write_bytes(written.getvalue())
    return path


def folder_of(
    folder: Path, *, kind: str | None = "llama", settings: dict | None = None, **files: Path | dict
) -> Path:
    """A model's folder: ``kind`` is config.json's model_type, ``settings`` are tokenizer_config.json.
    ``files``: a name without ".json", and a file to copy or an object to write."""
    folder.mkdir(exist_ok=True)
    if kind is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copy(content, folder / content.name)
        else:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
