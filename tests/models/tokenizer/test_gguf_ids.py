"""Tokenizers rebuilt from GGUF give the ids and texts of transformers' tokenizer of the same model.

The vocabularies are small and trained here. Each is a Hugging Face directory for transformers and a GGUF file
for us.
"""

import json
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from farshore.models.files.source import ModelSource
from farshore.models.tokenizer.load import load_tokenizer
from farshore.models.tokenizer.tokenizer import Tokenizer

from .corpus import make_corpus

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPECIAL = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
USER = ["<think>", "</think>", "\n\n\n\n\n"]
SPECIAL_TEXTS = [
    "<|im_start|>user\n  hi<|im_end|>\n<|im_start|>assistant\n",
    " <|begin|> <|begin|>x<|im_no|>|<think>\n 1+1 </think>2 \n\n\n\n\n\n\n3",
    "<|end|>",
    "",
]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A model family's tokenizer, as its own tokenizer.json has it."""

    pattern: str | None
    first: list = field(default_factory=list)
    normalizer: normalizers.Normalizer | None = None
    ignore_merges: bool = False
    bos: bool = False


# The patterns as the models' tokenizer.json have them.
QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = {
    "gpt-2": Kind(pattern=None),
    "smollm": Kind(pattern=None, first=[pre_tokenizers.Digits(individual_digits=True)]),
    "llama-bpe": Kind(pattern=QWEN_2.replace(r"\p{N}|", r"\p{N}{1,3}|"), ignore_merges=True, bos=True),
    "tekken": Kind(pattern=TEKKEN, ignore_merges=True, bos=True),
    "qwen2": Kind(pattern=QWEN_2, normalizer=normalizers.NFC()),
}


def train(kind, corpus):
    """tokenizer.json's content. The last merges are missing, so that some tokens can be found whole only."""
    backend = tokenizers.Tokenizer(BPE(ignore_merges=kind.ignore_merges))
    split = [pre_tokenizers.Split(Regex(kind.pattern), "isolated")] if kind.pattern else []
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*kind.first, *split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    if kind.normalizer is not None:
        backend.normalizer = kind.normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    backend.add_tokens([AddedToken(text, normalized=False) for text in USER])
    if kind.bos:
        bos = (SPECIAL[0], backend.token_to_id(SPECIAL[0]))
        backend.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    content = json.loads(backend.to_str())
    del content["model"]["merges"][-80:]
    return content


def write_gguf(path: Path, tokens, types, *, scores=None, merges=None, **values):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if scores is not None:
        writer.add_token_scores(scores)
    if merges is not None:
        writer.add_token_merges(merges)
    for key, value in values.items():
        kind = {str: gguf.GGUFValueType.STRING, bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32}
        writer.add_key_value(f"tokenizer.ggml.{key}", value, kind[type(value)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ours_from(path) -> Tokenizer:
    return load_tokenizer(ModelSource("model", path, "gguf"))


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return make_corpus()


@pytest.fixture(scope="module", params=KINDS)
def pair(request, corpus, tmp_path_factory):
    """(ours from GGUF, transformers' from the directory, the kind's name)."""
    from transformers import AutoTokenizer

    folder, kind = tmp_path_factory.mktemp(request.param), KINDS[request.param]
    content = train(kind, corpus)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(folder)
    added = {
        entry["content"]: CONTROL if entry["special"] else USER_DEFINED for entry in content["added_tokens"]
    }
    tokens = sorted(theirs.get_vocab(), key=theirs.get_vocab().get)
    types = [added.get(text, NORMAL) for text in tokens]
    padding = [f"[PAD{len(tokens) + extra}]" for extra in range(3)]
    path = write_gguf(
        folder / "model.gguf",
        tokens + padding,
        types + [UNUSED] * 3,
        merges=[" ".join(merge) for merge in content["model"]["merges"]],
        model="gpt2",
        pre=request.param,
        bos_token_id=tokens.index(SPECIAL[0]),
        eos_token_id=tokens.index(SPECIAL[1]),
    )
    return ours_from(path), theirs, request.param


def test_the_corpus_is_what_it_says(corpus):
    assert len(corpus) == 2000
    names = " ".join(unicodedata.name(c, "") for c in set("".join(corpus)))
    scripts = (
        "LATIN CYRILLIC GREEK ARABIC HEBREW DEVANAGARI BENGALI TAMIL THAI LAO KHMER GEORGIAN ARMENIAN "
        "ETHIOPIC HANGUL CJK HIRAGANA KATAKANA MONGOLIAN JOINER"
    )
    assert [script for script in scripts.split() if script not in names] == []


def test_ids_equal_transformers(pair, corpus):
    ours, theirs, _ = pair
    texts = [*corpus, *SPECIAL_TEXTS]
    expected = theirs(texts)["input_ids"]
    assert [text for text, ids in zip(texts, expected, strict=True) if ours.encode(text) != ids] == []
    bare = theirs(texts, add_special_tokens=False)["input_ids"]
    assert [ours.encode(text, add_special_tokens=False) for text in texts] == bare


def test_decoded_text_equals_transformers_and_the_source(pair, corpus):
    ours, theirs, name = pair
    ids = [ours.encode(text) for text in [*corpus, *SPECIAL_TEXTS]]
    assert [ours.decode(row) for row in ids] == theirs.batch_decode(ids, skip_special_tokens=True)
    form = "NFC" if name == "qwen2" else None
    source = [unicodedata.normalize(form, text) if form else text for text in corpus]
    assert [ours.decode(row) for row in ids[: len(corpus)]] == source


def test_a_token_without_merges_is_found_where_the_model_does_so(pair, corpus):
    """llama-bpe and tekken look a piece up before they merge it; the others can't reach such tokens."""
    ours, _, name = pair
    used = {token for text in corpus for token in ours.encode(text)}
    merged = {"".join(merge) for merge in json.loads(ours._backend.to_str())["model"]["merges"]}
    whole = {
        token for token in used if len(text := ours._backend.id_to_token(token)) > 1 and text not in merged
    }
    added = {ours._backend.token_to_id(text) for text in [*SPECIAL, *USER]}
    assert bool(whole - added) == (name in ("llama-bpe", "tekken"))


@pytest.mark.parametrize("pair", ["gpt-2", "qwen2"], indirect=True)
def test_classes_of_transformers_split_alike(pair, corpus):
    """A second reference for two splits: the classes that transformers has for GPT-2 and Qwen 2."""
    from transformers import GPT2Tokenizer, Qwen2Tokenizer

    ours, _, name = pair
    model = json.loads(ours._backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    theirs = (GPT2Tokenizer if name == "gpt-2" else Qwen2Tokenizer)(vocab=model["vocab"], merges=merges)
    texts = [text for text in corpus if USER[-1] not in text]  # they don't know our added tokens
    expected = theirs(texts, add_special_tokens=False)["input_ids"]
    assert [ours.encode(text) for text in texts] == expected


@pytest.fixture(scope="module")
def pieces(corpus):
    """(pieces, scores, types) of a small SentencePiece vocabulary."""
    backend = tokenizers.Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=2500, show_progress=False))
    content = json.loads(backend.to_str())["model"]
    merged = ["".join(merge) for merge in content["merges"]]
    blanks = ["▁" * length for length in (2, 4, 8, 3)]
    ranked = list(dict.fromkeys([*blanks, *merged, *content["vocab"]]))
    # Some characters have no piece of their own and become bytes.
    ranked = [piece for piece in ranked if len(piece) > 1 or ord(piece) % 5 or piece == "▁"]
    control, bytes_ = ["<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", *control, *bytes_, *ranked, "<think>"]
    types = [UNKNOWN, *[CONTROL] * 2, *[BYTE] * 256, *[NORMAL] * len(ranked), USER_DEFINED]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(ranked))] + [0.0]
    return tokens, scores, types


SPM_TEXTS = [
    "<s>[INST]  hi [/INST]</s><s> x<unk>",
    "<think> a</think><0x41>",
    "▁▁x ▁",
    *(f"{left}{' ' * length}{right}" for length in range(12) for left in ("", "a") for right in ("", "b")),
]


def test_sentencepiece_equals_transformers(pieces, corpus, tmp_path):
    from transformers import AutoTokenizer

    tokens, scores, types = pieces
    write_gguf(
        tmp_path / "m.gguf", tokens, types, scores=scores, model="llama", pre="default",
        bos_token_id=1, eos_token_id=2, unknown_token_id=0,
    )  # fmt: skip
    ours = ours_from(tmp_path / "m.gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    texts = [*corpus, *SPM_TEXTS]
    for extra in (True, False):
        expected = theirs(texts, add_special_tokens=extra)["input_ids"]
        assert [ours.encode(text, add_special_tokens=extra) for text in texts] == expected
    assert [ours.decode(ids) for ids in expected] == theirs.batch_decode(expected, skip_special_tokens=True)
    plain = [text for text in corpus if text and not text.startswith(" ")]
    assert [ours.decode(ours.encode(text)) for text in plain] == plain


def test_sentencepiece_without_a_first_blank(pieces, corpus, tmp_path):
    """The key that transformers ignores when it reads GGUF, and obeys in a directory."""
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    tokens, scores, types = pieces
    ours = ours_from(
        write_gguf(tmp_path / "m.gguf", tokens, types, scores=scores, model="llama", add_space_prefix=False)
    )
    vocabulary = {piece: token for token, piece in enumerate(tokens)}
    merges = generate_merges(vocabulary, dict(zip(tokens, scores, strict=True)))
    theirs = LlamaTokenizer(vocab=vocabulary, merges=merges, add_prefix_space=False)
    theirs.add_tokens(["<think>"])
    texts = [*corpus, *SPM_TEXTS]
    expected = theirs(texts, add_special_tokens=False)["input_ids"]
    assert [ours.encode(text, add_special_tokens=False) for text in texts] == expected
    assert [ours.decode(ids) for ids in expected] == theirs.batch_decode(expected, skip_special_tokens=True)
    assert [ours.decode(ours.encode(text)) for text in corpus] == corpus


def test_demo_equals_transformers(demo, corpus):
    """Over the corpus, with the split of SmolLM2's tokenizer.json: digits first. transformers drops that step
    when it reads GGUF. The vocabulary proves it: no token but the ten digits has a digit."""
    from transformers import AutoTokenizer

    ours = load_tokenizer(demo)
    theirs = AutoTokenizer.from_pretrained(demo.path.parent, gguf_file=demo.path.name)
    dropped = theirs("a  7")["input_ids"]
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    expected = theirs(corpus)["input_ids"]
    assert [ours.encode(text) for text in corpus] == expected
    assert [ours.decode(ids) for ids in expected] == theirs.batch_decode(expected, skip_special_tokens=True)
    assert ours.encode("a  7") != dropped
    digits = set("0123456789")
    assert {text for text in theirs.get_vocab() if digits & set(text)} == digits
