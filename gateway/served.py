"""The model that a gateway serves: its configuration, its tokenizer, its chat template and its names.

Loaded once by ``__main__``; read by validation and by the engine client. Must not know about weights.
"""

from dataclasses import dataclass
from pathlib import PurePath

from farshore.models.chat.prompts import ChatPrompts, SpecialTokensInChat
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
    chat: ChatPrompts

    @classmethod
    def load(cls, name: str, *, special_tokens_in_chat: SpecialTokensInChat = "text") -> "Served":
        """``name``: a model directory, a ``.gguf`` file, a Hugging Face id or "smollm2".
        ``special_tokens_in_chat``: whether a special token that a user types in a chat stays text. Raises
        ModelError with the fix; ``chat.await_compiled`` raises it for the chat template, which is compiled in
        the background."""
        source = resolve(name)
        config, tokenizer = load_config(source), load_tokenizer(source)
        chat = ChatPrompts(
            tokenizer, stop_ids=config.eos_token_ids, special_tokens_in_chat=special_tokens_in_chat
        )
        return cls(name=name, config=config, tokenizer=tokenizer, chat=chat)

    @property
    def alias(self) -> str:
        """The short name: the last component of the path or hub id, without ``.gguf``."""
        return PurePath(self.name).name.removesuffix(".gguf")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer. A GGUF file or an old configuration may name them in one of the two
        places only."""
        return tuple(dict.fromkeys((*self.config.eos_token_ids, *self.tokenizer.eos_ids)))
