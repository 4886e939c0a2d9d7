"""Encodes text in which a control token's text is text, as a user typed it.

A prompt from a chat template has control tokens that the template wrote. They stand under private names here,
and whatever else looks like a control token is encoded like any other text. Created by ``models.chat``; used
for the few prompts in which that differs from the tokenizer's own encoding. It must not know about messages.
"""

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence

import tokenizers
from tokenizers import AddedToken, Regex, pre_tokenizers

from farshore.errors import InvalidRequest
from farshore.text import shortened

_UNKNOWN = "\U0010fffe"
"""A character in no vocabulary."""
_MOST_CHARS = 120
_CHUNK = 1 << 14
"""Ids counted in one native call: other threads get the interpreter's lock between two calls."""


class LiteralEncoder:
    """Immutable, so threads may share it. ``names``: the private name of each control token's text. A user
    can't type it, since it has 64 random bits."""

    def __init__(self, backend: tokenizers.Tokenizer, control_ids: Iterable[int]) -> None:
        """``control_ids``: ids of added tokens of ``backend``. A token of a single character, such as a
        newline, can't be told from text: it is encoded as by the tokenizer."""
        added = backend.get_added_tokens_decoder()
        controls = {token: added[token] for token in control_ids if len(added[token].content) > 1}
        nonce = secrets.token_hex(8)
        self.names = {
            entry.content: f"\U0010f000{nonce}:{token}\U0010f001" for token, entry in controls.items()
        }
        # The clone shares the model, which has most of the memory, and the steps before it. Only the added
        # tokens differ.
        self._clone = tokenizers.Tokenizer(backend.model)
        if backend.normalizer is not None:
            self._clone.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._clone.pre_tokenizer = backend.pre_tokenizer
        self._skip_ids_of_model(len(added))
        for token, entry in sorted(added.items()):
            if token in controls:
                self._clone.add_special_tokens(
                    [
                        AddedToken(
                            self.names[entry.content],
                            lstrip=entry.lstrip,
                            rstrip=entry.rstrip,
                            normalized=False,
                        )
                    ]
                )
            else:
                self._clone.add_tokens([entry])
        self._ids: Mapping[int, int] = {
            self._clone.token_to_id(self.names.get(entry.content, entry.content)): token
            for token, entry in added.items()
        }
        self._texts = {token: entry.content for token, entry in controls.items()}
        # The model gives the unknown token's id to any text, so that one may come from text.
        for token in self._tried(_UNKNOWN):
            self._texts.pop(token, None)
        self._divide_vocabulary_words()

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, in which control tokens stand under their ``names``. Raises InvalidRequest if the
        model makes a control token of other text."""
        ids = self._encode(text)
        for token in ids:
            if token in self._texts and token not in self._ids:
                raise InvalidRequest(
                    f"the tokenizer makes the control token {self._texts[token]!r} of the messages' text: "
                    "leave it out of the messages"
                )
        return [self._ids.get(token, token) for token in ids]

    def count(self, ids: Sequence[int]) -> int:
        """How many of ``ids``, which the tokenizer itself has made, are control tokens."""
        return sum(
            sum(map(self._texts.__contains__, ids[first : first + _CHUNK]))
            for first in range(0, len(ids), _CHUNK)
        )

    def _encode(self, text: str) -> list[int]:
        # As in Tokenizer.encode: a batch of one releases the interpreter's lock.
        try:
            (encoded,) = self._clone.encode_batch_fast([text], add_special_tokens=False)
        except BaseException as error:
            # tokenizers raises plain Exception, and for damaged tables a panic that is none.
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise InvalidRequest(
                f"the tokenizer can't encode this text: {shortened(str(error), _MOST_CHARS)}"
            ) from error
        return encoded.ids

    def _tried(self, text: str) -> list[int]:
        """As ``_encode``; [] if the model can't encode the text, as one without an unknown token."""
        try:
            return self._encode(text)
        except InvalidRequest:
            return []

    def _skip_ids_of_model(self, count: int) -> None:
        """Adds tokens until the next ``count`` new ones get ids that the model does not use: the first new id
        is the number of the model's tokens, and its ids may have gaps."""
        model = self._clone.model
        first = self._clone.get_vocab_size()
        while taken := [i for i in range(first, first + count) if model.id_to_token(i) is not None]:
            self._clone.add_special_tokens(
                [f"\U0010f000{filler}\U0010f001" for filler in range(first, taken[-1] + 1)]
            )
            first = taken[-1] + 1

    def _divide_vocabulary_words(self) -> None:
        """Keeps the model from making a control token of its text: SentencePiece vocabularies contain
        ``</s>`` as a word like others. Its text is cut before its last character, and the model joins nothing
        across a cut."""
        words = [text for token, text in self._texts.items() if token in self._tried(text)]
        if not words:
            return
        cut = "|".join(
            f"(?<={re.escape(form[:-1])}){re.escape(form[-1:])}" for form in map(self._model_form, words)
        )
        steps = [pre_tokenizers.Split(Regex(cut), "merged_with_next")]
        if self._clone.pre_tokenizer is not None:
            steps.insert(0, self._clone.pre_tokenizer)
        self._clone.pre_tokenizer = pre_tokenizers.Sequence(steps)

    def _model_form(self, text: str) -> str:
        """``text`` as the model sees it within a line: some tokenizers replace blanks, or bytes by
        letters."""
        alone, preceded = (self._prepared(start) for start in ("a", "a" + text))
        return preceded.removeprefix(alone)

    def _prepared(self, text: str) -> str:
        if self._clone.normalizer is not None:
            text = self._clone.normalizer.normalize_str(text)
        if self._clone.pre_tokenizer is None:
            return text
        return "".join(piece for piece, _ in self._clone.pre_tokenizer.pre_tokenize_str(text))
