"""Small tokenizers, trained here."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from farshore.models.tokenizer.load import load_tokenizer
from farshore.models.tokenizer.tokenizer import Tokenizer

from .made import CORPUS, folder_of, train_sentencepiece


@pytest.fixture(scope="session")
def ours(demo) -> Tokenizer:
    """The demo model's."""
    return load_tokenizer(demo)


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory) -> Path:
    """A byte-level BPE ``tokenizer.json`` that puts <s> before a text."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    backend.save(str(path))
    return path


@pytest.fixture(scope="session")
def pieces(tmp_path_factory) -> SimpleNamespace:
    """SentencePiece models: ``llama`` has Llama 2's settings; ``unigram`` has the trainer's own ones, with
    byte fallback."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "llama").mkdir()
    (folder / "unigram").mkdir()
    return SimpleNamespace(
        llama=train_sentencepiece(
            folder / "llama" / "tokenizer.model",
            model_type="bpe",
            vocab_size=620,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            user_defined_symbols=["<|tool|>"],
            control_symbols=["[INST]"],
        ),
        unigram=train_sentencepiece(
            folder / "unigram" / "tokenizer.model", model_type="unigram", vocab_size=520, byte_fallback=True
        ),
    )


@pytest.fixture(scope="session")
def pieces_json(pieces, tmp_path_factory) -> Path:
    """The ``tokenizer.json`` that transformers makes of ``pieces.llama``."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("pieces_json")
    settings = dict(tokenizer_class="LlamaTokenizer", add_bos_token=True)
    folder_of(folder / "from", settings=settings, model=pieces.llama)
    AutoTokenizer.from_pretrained(folder / "from").save_pretrained(folder)
    return folder / "tokenizer.json"
