"""How a byte-level tokenizer of a GGUF file normalizes and splits text before it merges bytes.

A GGUF file has only the split's name (``tokenizer.ggml.pre``). Listed are the names whose split was verified:
the pattern is the one of the models' own ``tokenizer.json``, and real vocabularies give the ids that
llama.cpp expects for its check text. Called by ``gguf``. It must not know about files.
"""

from dataclasses import dataclass

import tokenizers
from tokenizers import Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

# A contraction; letters after at most one other character; digits; punctuation; blanks. {digits}: how many
# make a piece.
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{digits}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Like it, but words also end where lower case turns to upper case.
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Split:
    """One way to split text. All pieces are then spelled as bytes."""

    pattern: str | None = None
    """Regular expression of one piece; None for GPT-2's."""
    digits_first: bool = False
    """Every digit is a piece of its own, split off before ``pattern`` is searched."""
    nfc: bool = False
    """Text is composed to Unicode's form NFC first."""
    ignore_merges: bool = False
    """A piece that is a token stays whole, even if no merges lead to it."""
    adds_bos: bool = False
    """The default of ``tokenizer.ggml.add_bos_token``, as in llama.cpp."""

    def build(self, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
        """A tokenizer that splits so and then merges. Raises what ``tokenizers`` raises for merges that don't
        fit the vocabulary."""
        model = BPE(vocab=vocabulary, merges=merges, ignore_merges=self.ignore_merges)
        backend = tokenizers.Tokenizer(model)
        if self.nfc:
            backend.normalizer = normalizers.NFC()
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pattern is None)
        steps = [pre_tokenizers.Digits(individual_digits=True)] if self.digits_first else []
        if self.pattern is not None:
            steps.append(pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"))
        backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, to_bytes]) if steps else to_bytes
        backend.decoder = decoders.ByteLevel()
        return backend


_LLAMA_3 = Split(_CL100K.replace("{digits}", "{1,3}"), ignore_merges=True, adds_bos=True)
SPLITS = {
    "gpt-2": Split(),
    "llama-bpe": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "llama3": _LLAMA_3,
    # transformers composes to NFC with the model's own files, but not when it reads them from GGUF.
    "qwen2": Split(_CL100K.replace("{digits}", ""), nfc=True),
    # SmolLM's tokenizer.json and llama.cpp split digits off first; transformers drops that step when it reads
    # GGUF. Ids differ where several blanks precede a digit: the model has learned the last blank as part of
    # the blanks, not of the digit.
    "smollm": Split(digits_first=True),
    "tekken": Split(_TEKKEN, ignore_merges=True, adds_bos=True),
}
"""The supported values of ``tokenizer.ggml.pre``."""
