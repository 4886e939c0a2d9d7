"""Builds a tokenizer from SentencePiece's ``tokenizer.model``, as transformers 5 converts it.

transformers has two conversions, and a folder's files decide between them (``hf_class``): the Llama class
fixes how text is normalised, and the general one follows the model's own settings. Both are here, each
with the ids of transformers. Called by ``hf``. It must not know about other files of the folder.
"""

import re
from collections.abc import Mapping

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from farshore.errors import ModelError
from farshore.models.tokenizer.sentencepiece_file import UNIGRAM, SentencePieceFile
from farshore.models.tokenizer.spm import PieceType

_BLANK = "\N{LOWER ONE EIGHTH BLOCK}"


def llama_model(file: SentencePieceFile) -> models.BPE:
    """The Llama class's model: merges rank by the joined piece's id. Raises ModelError for a Unigram model,
    which that class would read as BPE."""
    if file.trainer.model_type == UNIGRAM:
        raise ModelError(
            f"{file.path}: a Unigram model, which tokenizer_class LlamaTokenizer reads wrongly; "
            "remove tokenizer_class from tokenizer_config.json"
        )
    ids = {text: token for token, (text, _, _) in enumerate(file.pieces)}
    merges = [
        (text[:cut], text[cut:])
        for text in ids
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    return models.BPE(vocab=ids, merges=merges)


def whole_pieces(file: SentencePieceFile, *, user_defined: bool) -> list[AddedToken]:
    """Control pieces, and with ``user_defined`` those too: found in text before it is split. Control ones are
    special: decoding leaves them out."""
    kinds = {PieceType.CONTROL, *([PieceType.USER_DEFINED] if user_defined else [])}
    return [
        AddedToken(text, normalized=False, special=kind == PieceType.CONTROL)
        for text, _, kind in file.pieces
        if kind in kinds
    ]


def general_backend(
    file: SentencePieceFile, names: Mapping[int, str], *, prefix_every_chunk: bool
) -> tokenizers.Tokenizer:
    """A tokenizer that follows the file's own settings. ``names``: new names of pieces by id.
    ``prefix_every_chunk``: texts after added tokens get a blank before them too, not the first text only."""
    texts = _renamed(file, names)
    byte_fallback, normalizer = file.trainer.byte_fallback, file.normalizer
    kinds = [kind for _, _, kind in file.pieces]
    whole = [text for text, kind in zip(texts, kinds, strict=True) if kind == PieceType.USER_DEFINED]
    backend = tokenizers.Tokenizer(_general_model(file, texts, has_whole=bool(whole)))
    backend.normalizer = normalizers.Sequence(_normalizers(file, prefix_every_chunk))
    splits: list[pre_tokenizers.PreTokenizer] = []
    if normalizer.add_dummy_prefix:
        scheme = "always" if prefix_every_chunk else "first"
        splits.append(pre_tokenizers.Metaspace(replacement=_BLANK, prepend_scheme=scheme, split=False))
    if whole:
        # SentencePiece never merges user-defined pieces with others.
        pattern = "|".join(re.escape(text) for text in sorted(whole, key=len, reverse=True))
        splits.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    if splits:
        backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    steps: list[decoders.Decoder] = [decoders.Replace(_BLANK, " ")]
    if byte_fallback:
        steps.append(decoders.ByteFallback())
    if byte_fallback or normalizer.add_dummy_prefix:
        steps.append(decoders.Fuse())
    if normalizer.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _renamed(file: SentencePieceFile, names: Mapping[int, str]) -> list[str]:
    """The pieces' texts with new names, except where a piece that keeps its name has it already."""
    if file.trainer.model_type == UNIGRAM:
        return [text for text, _, _ in file.pieces]
    kept = {text for token, (text, _, _) in enumerate(file.pieces) if token not in names}
    return [
        names[token] if token in names and names[token] not in kept else text
        for token, (text, _, _) in enumerate(file.pieces)
    ]


def _general_model(file: SentencePieceFile, texts: list[str], *, has_whole: bool) -> models.Model:
    trainer = file.trainer
    if trainer.model_type == UNIGRAM:
        vocabulary = [(text, score) for text, score, _ in file.pieces]
        return models.Unigram(vocabulary, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    if len(set(texts)) < len(texts):
        raise ModelError(f"{file.path}: added_tokens_decoder gives two pieces the same text; correct it")
    normal = {
        text: (-score, token)
        for token, (text, (_, score, kind)) in enumerate(zip(texts, file.pieces, strict=True))
        if kind == PieceType.NORMAL
    }
    ranked = sorted(
        (*rank, text[:cut], text[cut:])
        for text, rank in normal.items()
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    )
    return models.BPE(
        vocab={text: token for token, text in enumerate(texts)},
        merges=[(left, right) for _, _, left, right in ranked],
        unk_token=trainer.unk_piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
        ignore_merges=has_whole,
    )


def _normalizers(file: SentencePieceFile, prefix_every_chunk: bool) -> list[normalizers.Normalizer]:
    """The file's settings in SentencePiece's order."""
    settings = file.normalizer
    steps: list[normalizers.Normalizer] = []
    if settings.precompiled_charsmap:
        try:
            steps.append(normalizers.Precompiled(settings.precompiled_charsmap))
        except Exception as error:  # tokenizers raises plain Exception
            raise ModelError(f"{file.path}: its normalisation map is damaged; download it again") from error
    if settings.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if settings.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _BLANK))
    if settings.add_dummy_prefix and prefix_every_chunk:
        # Metaspace adds no blank before a text that begins with one, but SentencePiece does.
        steps.append(normalizers.Replace(Regex(rf"\A{_BLANK}"), _BLANK * 2))
    return steps
