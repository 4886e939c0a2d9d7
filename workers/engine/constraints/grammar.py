"""Grammars that completions must follow: which tokens may come next.

Compiled for a request by ``engine_service``, asked by ``token_mask``. llguidance compiles a grammar and
computes the masks; it bounds both by fuel, and releases the interpreter's lock. A mask is computed in a
thread of its own while the next step runs. It must not know sequences or how a token is drawn.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import llguidance.numpy
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from farshore.errors import FarshoreError, InvalidRequest
from farshore.models.tokenizer.tokenizer import Tokenizer
from farshore.text import shortened

LIMITS = LLParserLimits(verbose_errors=False)
"""llguidance's defaults: about 20 ms for a lexer, 14 ms for one mask. An error must not repeat the
grammar."""


class GrammarCompiler:
    """Compiles grammars for one model. Thread-safe. The vocabulary is read at the first grammar: that takes
    half a second of a core, which most engines never need."""

    def __init__(self, tokenizer: Callable[[], Tokenizer], *, vocab: int, eos_ids: Sequence[int]) -> None:
        """``tokenizer``: loads it. ``vocab``: tokens of the model. ``eos_ids``: those that end an answer."""
        self._load = tokenizer
        self.vocab = vocab
        self._eos_ids = list(eos_ids)
        self._lock = threading.Lock()
        self._tokens: LLTokenizer | None = None
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    def compile(self, grammar: str) -> "Grammar":
        """``grammar``: in llguidance's form, as the gateway makes it. Blocks for milliseconds, at the first
        call for longer. Raises InvalidRequest for a grammar that is wrong or too large."""
        matcher = LLMatcher(self._vocabulary(), grammar, limits=LIMITS)
        if matcher.is_error():
            raise InvalidRequest(f"the grammar can't be used: {shortened(matcher.get_error())}")
        return Grammar(matcher, vocab=self.vocab, beside=self._beside)

    def _vocabulary(self) -> LLTokenizer:
        with self._lock:
            if self._tokens is None:
                loaded = self._load()
                self._tokens = LLTokenizer(
                    loaded.backend.to_str(),
                    n_vocab=self.vocab,
                    eos_token=self._eos_ids or list(loaded.eos_ids),
                )
            return self._tokens


class Grammar:
    """One completion's place in its grammar. Not thread-safe."""

    def __init__(self, matcher: LLMatcher, *, vocab: int, beside: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._vocab = vocab
        self._beside = beside
        self._consumed = 0
        self._next: Future[NDArray[np.bool_]] | None = None

    def copy(self) -> "Grammar":
        """An independent copy at the same place, for a fork."""
        self._settle()
        copy = Grammar(self._matcher.deep_copy(), vocab=self._vocab, beside=self._beside)
        copy._consumed = self._consumed
        return copy

    def prepare(self, tokens: Sequence[int], prompt_tokens: int) -> None:
        """Begins to compute the mask that :meth:`mask` will be asked for with the same arguments."""
        self._move(tokens, prompt_tokens)
        self._next = self._beside.submit(self._computed)

    def truncate(self, tokens: Sequence[int], prompt_tokens: int) -> None:
        """Moves back to the end of ``tokens``, which other tokens may follow then."""
        self._move(tokens, prompt_tokens)

    def mask(self, tokens: Sequence[int], prompt_tokens: int) -> NDArray[np.bool_]:
        """Which tokens may follow, bool[vocab]. ``tokens``: the prompt and the completion so far.

        The time is proportional to the difference from the last call. Between two calls the completion may
        be extended or truncated, but not truncated and then extended: only its length is compared. Raises
        FarshoreError if the mask takes too much work."""
        if self._next is not None and self._consumed == len(tokens) - prompt_tokens:
            computed, self._next = self._next, None
            return computed.result()
        self._move(tokens, prompt_tokens)
        return self._computed()

    def _computed(self) -> NDArray[np.bool_]:
        bits = llguidance.numpy.allocate_token_bitmask(1, self._vocab)
        llguidance.numpy.fill_next_token_bitmask(self._matcher, bits, 0)
        self._check()
        return np.unpackbits(bits.view(np.uint8), count=self._vocab, bitorder="little").view(np.bool_)

    def _move(self, tokens: Sequence[int], prompt_tokens: int) -> None:
        """Moves to the end of ``tokens``."""
        self._settle()
        count = len(tokens) - prompt_tokens
        if count < self._consumed:
            self._matcher.rollback(self._consumed - count)
            self._consumed = count
        for token in tokens[prompt_tokens + self._consumed :]:
            self._matcher.consume_token(token)
            self._consumed += 1
        self._check()

    def _settle(self) -> None:
        """Waits until the thread beside no longer uses the matcher."""
        if self._next is not None:
            self._next.exception()
            self._next = None

    def _check(self) -> None:
        if self._matcher.is_error():
            why = shortened(self._matcher.get_error())
            raise FarshoreError(f"the answer can't follow its grammar after {self._consumed} tokens: {why}")
