"""The model that a gateway serves: its configuration, its tokenizer, its chat template and its names.

Loaded once by ``__main__``; read by validation and by the engine client. Must not know about weights.
"""

from dataclasses import dataclass

from farshore.model_spec import ModelSpec
from farshore.models.chat.prompts import ChatPrompts
from farshore.models.config.generation import GenerationDefaults, load_generation
from farshore.models.config.load import load_spec
from farshore.models.config.model import ModelConfig
from farshore.models.files.source import read_template, resolve_tokenizer
from farshore.models.tokenizer.load import load_tokenizer
from farshore.models.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Immutable; threads may share it. ``spec``: what the cluster was asked to serve."""

    spec: ModelSpec
    config: ModelConfig
    tokenizer: Tokenizer
    chat: ChatPrompts
    generation: GenerationDefaults
    """The values of options that a request leaves unset."""
    chat_template: str
    """The Jinja source of the chat template, or of all of them; empty if there is none."""

    @classmethod
    def load(cls, spec: ModelSpec) -> "Served":
        """Raises ModelError or InvalidRequest with the fix; ``chat.await_compiled`` raises it for the chat
        template, which is compiled in the background."""
        source, config = load_spec(spec)
        tokenizer = load_tokenizer(resolve_tokenizer(spec.tokenizer) if spec.tokenizer else source)
        template = read_template(spec)
        chat = ChatPrompts(
            tokenizer,
            template=template,
            where=f"--chat-template {spec.chat_template}" if spec.chat_template else None,
            stop_ids=config.eos_token_ids,
            special_tokens_in_chat=spec.special_tokens_in_chat,
        )
        sources = template or tokenizer.chat_template or ""
        text = sources if isinstance(sources, str) else "\n".join(sources.values())
        return cls(
            spec=spec,
            config=config,
            tokenizer=tokenizer,
            chat=chat,
            chat_template=text,
            generation=load_generation(spec, source, vocab=config.vocab),
        )

    @property
    def positions(self) -> str:
        """The longest prompt and answer together, for messages: "8192 positions", and the option that says
        so."""
        option = "" if self.spec.max_model_len is None else " (--max-model-len)"
        return f"{self.config.max_positions} positions{option}"

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer: those at which transformers' generate stops. A file that
        --generation-config names goes before the model's own. Where the model's
        configuration names none, as in every GGUF file, they are the tokenizer's."""
        return self.generation.eos_token_ids or self.config.eos_token_ids or self.tokenizer.eos_ids
