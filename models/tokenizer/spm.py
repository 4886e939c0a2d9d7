"""Builds a ``tokenizers`` object from a SentencePiece BPE vocabulary: pieces with scores and types.

Called by ``gguf``, whose metadata have such a vocabulary without merges. It must not know about files.
"""

from collections.abc import Sequence
from enum import IntEnum

import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers.models import BPE


class PieceType(IntEnum):
    """What a piece is. SentencePiece's model files and GGUF use the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_BLANK = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for a blank inside pieces
# Text never merges to these, even if it spells them.
_NEVER_MERGED = frozenset({PieceType.UNKNOWN, PieceType.CONTROL, PieceType.BYTE})


def build_spm(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], *, space_prefix: bool
) -> tokenizers.Tokenizer:
    """A tokenizer of ``pieces``, which are distinct; their ids are their indexes. All three sequences have
    one entry a piece.

    Of two possible merges, the one to the piece with the higher score comes first. A character that no piece
    spells becomes its UTF-8 bytes, or else the piece of type UNKNOWN. ``space_prefix``: encoding puts a blank
    before a text unless it begins with one, and decoding takes a leading blank away. So transformers does it;
    SentencePiece puts a blank before a blank, too.
    """
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    unknown = next(
        (piece for piece, kind in zip(pieces, types, strict=True) if kind == PieceType.UNKNOWN), None
    )
    skipped = {piece for piece, kind in zip(pieces, types, strict=True) if kind in _NEVER_MERGED}
    merges = _merges_by_score(pieces, scores, skipped)
    backend = tokenizers.Tokenizer(
        BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    # "first": a text after a special token gets no blank, as in transformers. llama.cpp would add one.
    scheme = "first" if space_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_BLANK, prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(content=" ", left=1)] if space_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    add_whole_tokens(backend, pieces, types)
    return backend


def add_whole_tokens(backend: tokenizers.Tokenizer, pieces: Sequence[str], types: Sequence[int]) -> None:
    """Lets ``backend`` find control, unknown and user-defined pieces in text before it splits the text.
    Control and unknown ones become special: decoding can leave them out."""
    typed = list(zip(pieces, types, strict=True))
    special = (PieceType.CONTROL, PieceType.UNKNOWN)
    backend.add_special_tokens(
        [AddedToken(piece, normalized=False) for piece, kind in typed if kind in special]
    )
    backend.add_tokens(
        [AddedToken(piece, normalized=False) for piece, kind in typed if kind == PieceType.USER_DEFINED]
    )


def _merges_by_score(
    pieces: Sequence[str], scores: Sequence[float], skipped: set[str]
) -> list[tuple[str, str]]:
    """All pairs of pieces that join to a piece, those of the highest score first. Pairs that join to equally
    good pieces come in transformers' order: the longest left half first, then the longest right half.
    ``skipped``: pieces that take no part."""
    known = set(pieces) - skipped
    merges = [
        (-scores[token], -cut, cut - len(piece), token)
        for token, piece in enumerate(pieces)
        if piece in known
        for cut in range(1, len(piece))
        if piece[cut:] in known and piece[:cut] in known
    ]
    merges.sort()
    return [(pieces[token][:-left], pieces[token][-left:]) for _, left, _, token in merges]
