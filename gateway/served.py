"""The model that a gateway serves: its configuration, its tokenizer and its names.

Loaded once by ``__main__``; read by validation and by the engine client. Must not know about weights.
"""

from dataclasses import dataclass
from pathlib import PurePath

from farshore.models.config.load import load_config
from farshore.models.config.model import ModelConfig
from farshore.models.files.source import resolve
from farshore.models.tokenizer.load import load_tokenizer
from farshore.models.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Immutable; threads may share it."""

    name: str
    config: ModelConfig
    tokenizer: Tokenizer

    @classmethod
    def load(cls, name: str) -> "Served":
        """``name``: a model directory, a ``.gguf`` file, a Hugging Face id or "smollm2". Raises ModelError
        with the fix."""
        source = resolve(name)
        return cls(name=name, config=load_config(source), tokenizer=load_tokenizer(source))

    @property
    def alias(self) -> str:
        """The short name: the last component of the path or hub id, without ``.gguf``."""
        return PurePath(self.name).name.removesuffix(".gguf")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer: those at which transformers' generate stops. Where the model's
        configuration names none, as in every GGUF file, they are the tokenizer's."""
        return self.config.eos_token_ids or self.tokenizer.eos_ids
