"""Loads the tokenizer of a model at a source of either format.

Called by the gateway, which has no torch. It must not know about weights.
"""

from farshore.models.files.gguf import GgufFile
from farshore.models.files.source import ModelSource
from farshore.models.tokenizer.gguf import from_gguf
from farshore.models.tokenizer.hf import from_hf
from farshore.models.tokenizer.tokenizer import Tokenizer


def load_tokenizer(source: ModelSource) -> Tokenizer:
    """Loads the tokenizer of the model at ``source``. Raises ModelError."""
    if source.kind == "gguf":
        return from_gguf(GgufFile.open(source.path), source.name)
    return from_hf(source.path, source.name)
