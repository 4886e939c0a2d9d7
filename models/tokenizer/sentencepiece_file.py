"""Reads SentencePiece's ``tokenizer.model``: a protobuf message with the pieces and how text is normalised.

The message's description is built here at run time, with the fields that matter, so that neither the
``sentencepiece`` package nor generated code is needed. Called by ``sentencepiece`` and ``hf``. It must not
know how text is split.
"""

import base64
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from farshore.errors import ModelError

_Field = descriptor_pb2.FieldDescriptorProto
_TEXT, _BYTES, _FLOAT = _Field.TYPE_STRING, _Field.TYPE_BYTES, _Field.TYPE_FLOAT
_INT, _BOOL = _Field.TYPE_INT32, _Field.TYPE_BOOL  # An enumeration is read as its number.
# Message -> field -> (number, type, default), from sentencepiece_model.proto.
_FIELDS: dict[str, dict[str, tuple[int, int, str | None]]] = {
    "Piece": {"piece": (1, _TEXT, None), "score": (2, _FLOAT, None), "type": (3, _INT, "1")},
    "Trainer": {
        "model_type": (3, _INT, "1"),
        "treat_whitespace_as_suffix": (24, _BOOL, None),
        "byte_fallback": (35, _BOOL, None),
        "unk_id": (40, _INT, "0"),
        "bos_id": (41, _INT, "1"),
        "eos_id": (42, _INT, "2"),
        "unk_piece": (45, _TEXT, "<unk>"),
        "bos_piece": (46, _TEXT, "<s>"),
        "eos_piece": (47, _TEXT, "</s>"),
    },
    "Normalizer": {
        "precompiled_charsmap": (2, _BYTES, None),
        "add_dummy_prefix": (3, _BOOL, "true"),
        "remove_extra_whitespaces": (4, _BOOL, "true"),
        "escape_whitespaces": (5, _BOOL, "true"),
    },
}
UNIGRAM, BPE = 1, 2
"""Kinds of models (``model_type``)."""


@dataclass(frozen=True, slots=True)
class SentencePieceFile:
    """``pieces``: (text, score, type); a piece's index is its token id. ``trainer``, ``normalizer``: messages
    with the fields listed in this module."""

    path: Path
    pieces: list[tuple[str, float, int]]
    trainer: Any
    normalizer: Any

    @classmethod
    def read(cls, path: Path) -> "SentencePieceFile":
        """Raises ModelError if the file is damaged or asks for what can't be built."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ModelError(f"{path}: can't be read: {error.strerror or error}") from error
        if _is_tiktoken(data):
            raise ModelError(
                f"{path}: a tiktoken vocabulary, not SentencePiece's; get the model's tokenizer.json, or "
                "convert it: transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        model = _MODEL()
        try:
            model.ParseFromString(data)
        except (message.DecodeError, UnicodeDecodeError) as error:
            raise ModelError(f"{path}: not a SentencePiece model; download it again") from error
        pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
        file = cls(path, pieces, model.trainer_spec, model.normalizer_spec)
        file._check(has_denormalizer=bool(model.denormalizer_spec.precompiled_charsmap))
        return file

    def _check(self, *, has_denormalizer: bool) -> None:
        if not self.pieces:
            raise ModelError(f"{self.path}: not a SentencePiece model; download it again")
        if not 0 <= self.trainer.unk_id < len(self.pieces):
            raise ModelError(f"{self.path}: unk_id lies outside the pieces; download it again")
        if not all(isfinite(score) for _, score, _ in self.pieces):
            raise ModelError(f"{self.path}: a piece's score is not a number; download it again")
        if self.trainer.model_type not in (UNIGRAM, BPE):
            raise ModelError(
                f"{self.path}: SentencePiece model_type {self.trainer.model_type} is unsupported; "
                "supported: 1 (Unigram), 2 (BPE)"
            )
        if self.trainer.treat_whitespace_as_suffix:
            raise ModelError(f"{self.path}: treat_whitespace_as_suffix is unsupported; use another model")
        if has_denormalizer:
            raise ModelError(f"{self.path}: a denormaliser is unsupported; use another model")
        if len({text for text, _, _ in self.pieces}) < len(self.pieces):
            raise ModelError(f"{self.path}: two pieces have the same text; download it again")


def _is_tiktoken(data: bytes) -> bool:
    """Whether the first line is a token in base64 and its rank."""
    token, _, rank = data[:200].partition(b"\n")[0].rstrip(b"\r").partition(b" ")
    try:
        return rank.isdigit() and bool(base64.b64decode(token, validate=True))
    except ValueError:
        return False


def _message_class() -> type[Any]:
    file = descriptor_pb2.FileDescriptorProto(name="farshore_sentencepiece.proto", package="farshore_spm")
    for name, fields in _FIELDS.items():
        described = file.message_type.add(name=name)
        for field, (number, kind, default) in fields.items():
            described.field.add(
                name=field, number=number, type=kind, label=_Field.LABEL_OPTIONAL, default_value=default
            )
    model = file.message_type.add(name="Model")
    for name, number, kind, label in (
        ("pieces", 1, "Piece", _Field.LABEL_REPEATED),
        ("trainer_spec", 2, "Trainer", _Field.LABEL_OPTIONAL),
        ("normalizer_spec", 3, "Normalizer", _Field.LABEL_OPTIONAL),
        ("denormalizer_spec", 5, "Normalizer", _Field.LABEL_OPTIONAL),
    ):
        described = model.field.add(name=name, number=number, label=label, type=_Field.TYPE_MESSAGE)
        described.type_name = f".farshore_spm.{kind}"
    # A pool of its own, so that the names meet no other program's.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("farshore_spm.Model"))


_MODEL = _message_class()
