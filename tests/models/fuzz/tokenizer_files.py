"""Small tokenizers of each kind, trained once on a few lines of text, and the files of a drawn one."""

import functools
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

KINDS = ("byte-level", "metaspace", "prepend", "unigram", "sentencepiece bpe", "sentencepiece unigram")
"""The last two have a tokenizer.model and no tokenizer.json."""
SPECIAL = ("<unk>", "<s>", "</s>")
EXTRA = ("<|end|>", "<tool>")
_CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12 o'clock, isn't it?",
    "  def f(x):\n    return {'a': x ** 2, 'b': [1, 2, 345]}\n\n",
    "Straße, façade, naïve; Привет, мир! 日本語のテキスト and 한국어.",
    "the cat sat on the mat and the hat of the bat",
] * 3


@dataclass(frozen=True)
class TokenizerRecipe:
    """``kind``: one of KINDS. ``prefix``: prepend_scheme of Metaspace; or 'always' and 'never' for
    add_prefix_space of byte-level and add_dummy_prefix of SentencePiece. ``post``: 'none', 'bos', 'bos and
    eos' or 'byte-level'. ``flags``: of the added tokens, by text. ``ignore_merges``: as Llama 3's BPE.
    ``config``, ``special_map``: the objects in tokenizer_config.json and special_tokens_map.json. ``added``:
    tokens that added_tokens.json lists after EXTRA, with ids counted from the vocabulary's end; None: no such
    file."""

    kind: str
    prefix: str = "always"
    post: str = "none"
    truncation: int | None = None
    padding: int | None = None
    ignore_merges: bool = False
    flags: dict[str, dict[str, bool]] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    special_map: dict[str, Any] | None = None
    added: dict[str, int] | None = None


def write_tokenizer(recipe: TokenizerRecipe, folder: Path) -> None:
    added = None
    if recipe.added is not None:
        ids, end = token_ids(recipe.kind, recipe.prefix), size(recipe.kind, recipe.prefix)
        added = {text: ids[text] for text in EXTRA}
        added |= {text: end + place for text, place in recipe.added.items()}
    from_sentencepiece = recipe.kind.startswith("sentencepiece")
    if from_sentencepiece:
        (folder / "tokenizer.model").write_bytes(_sentencepiece(recipe.kind, recipe.prefix))
    files = {
        "tokenizer.json": None if from_sentencepiece else tokenizer_json(recipe),
        "tokenizer_config.json": recipe.config,
        "special_tokens_map.json": recipe.special_map,
        "added_tokens.json": added,
    }
    for name, value in files.items():
        if value is not None:
            (folder / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def tokenizer_json(recipe: TokenizerRecipe) -> dict[str, Any]:
    value = json.loads(_trained(recipe.kind, recipe.prefix))
    if recipe.ignore_merges and "ignore_merges" in value["model"]:
        value["model"]["ignore_merges"] = True
    for token in value["added_tokens"]:
        token |= recipe.flags.get(token["content"], {})
    value["post_processor"] = _post_processor(recipe.post)
    if recipe.truncation is not None:
        value["truncation"] = {
            "direction": "Right",
            "max_length": recipe.truncation,
            "strategy": "LongestFirst",
            "stride": 0,
        }
    if recipe.padding is not None:
        value["padding"] = {
            "strategy": {"Fixed": recipe.padding},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<unk>",
        }
    return value


def size(kind: str, prefix: str) -> int:
    """Tokens in the vocabulary of such a tokenizer, added ones included."""
    if kind.startswith("sentencepiece"):
        return _processor(kind, prefix).get_piece_size()
    return tokenizers.Tokenizer.from_str(_trained(kind, prefix)).get_vocab_size()


def token_ids(kind: str, prefix: str) -> dict[str, int]:
    """The ids of SPECIAL and EXTRA."""
    if kind.startswith("sentencepiece"):
        find = _processor(kind, prefix).piece_to_id
    else:
        find = tokenizers.Tokenizer.from_str(_trained(kind, prefix)).token_to_id
    return {text: find(text) for text in (*SPECIAL, *EXTRA)}


def _post_processor(post: str) -> dict[str, Any] | None:
    if post == "none":
        return None
    if post == "byte-level":
        return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    last = [{"SpecialToken": {"id": "</s>", "type_id": 0}}] if post == "bos and eos" else []
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": [first, *text, *last],
        "pair": [first, *text, *last, first, *second, *last],
        "special_tokens": {
            token: {"id": token, "ids": [SPECIAL.index(token)], "tokens": [token]} for token in SPECIAL[1:]
        },
    }


@functools.cache
def _trained(kind: str, prefix: str) -> str:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    specials = [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    if kind == "byte-level":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix == "always")
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind == "unigram":
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=prefix)
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=specials, unk_token="<unk>", show_progress=False
        )
    else:
        # Llama 2's: bytes follow the special tokens, and only characters that training saw are pieces.
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if kind == "prepend":
            prepend = [normalizers.Prepend("▁")] if prefix != "never" else []
            tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
        if prefix != "never":
            steps.append(decoders.Strip(" ", 1, 0))
        tokenizer.decoder = decoders.Sequence(steps)
        trainer = trainers.BpeTrainer(
            vocab_size=420, special_tokens=[*specials, *bytes_], show_progress=False, max_token_length=8
        )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    value = json.loads(tokenizer.to_str())
    # Bytes are pieces of the model, not added tokens.
    value["added_tokens"] = [entry for entry in value["added_tokens"] if entry["content"] in SPECIAL]
    first = len(value["model"]["vocab"])
    for token_id, text in enumerate(EXTRA, start=first):
        value["added_tokens"].append(
            {
                "id": token_id,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": text == "<|end|>",
            }
        )
    return json.dumps(value)


def _processor(kind: str, prefix: str) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=_sentencepiece(kind, prefix))


@functools.cache
def _sentencepiece(kind: str, prefix: str) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS),
        model_writer=written,
        model_type=kind.removeprefix("sentencepiece "),
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        add_dummy_prefix=prefix == "always",
        normalization_rule_name="identity" if kind.endswith("bpe") else "nmt_nfkc",
        remove_extra_whitespaces=kind.endswith("unigram"),
        control_symbols=EXTRA[0],
        user_defined_symbols=EXTRA[1],
        minloglevel=2,
        num_threads=1,
    )
    return written.getvalue()
