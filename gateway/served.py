"""The one model a gateway serves: its shape, its tokenizer and the names it answers to.

Loaded once by ``__main__``; read by validation and by the request log. Must not know about weights.
"""

from dataclasses import dataclass
from pathlib import PurePath

from farshore.models.config import ModelConfig, load_config
from farshore.models.source import resolve
from farshore.models.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    name: str
    config: ModelConfig
    tokenizer: Tokenizer

    @classmethod
    def load(cls, name: str) -> "Served":
        """Raises ModelError naming the fix."""
        source = resolve(name)
        return cls(name=name, config=load_config(source), tokenizer=load_tokenizer(source))

    @property
    def alias(self) -> str:
        """The short name: a path's or hub id's last part, without ``.gguf``."""
        return PurePath(self.name).name.removesuffix(".gguf")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        # A GGUF file or an old config may name an end token in one of the two places only.
        return tuple(dict.fromkeys((*self.config.eos_token_ids, *self.tokenizer.eos_ids)))
