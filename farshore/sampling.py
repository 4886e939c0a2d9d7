"""Sampling parameters: how the tokens of a request's completions are drawn.

The SDK makes a :class:`Sampling` from its caller's arguments, the message ``Sampling`` of
``proto/inference.proto`` carries it to the gateway and on to an engine, and the engine draws by it. One class
and one message, so that an option is named in one place. It must not know what an option does.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Self

_ROUNDED = 1e-6
"""Relative tolerance of a lower bound: 0.01 travels as a float32 slightly below 0.01."""


class Range(NamedTuple):
    """The numbers from ``low`` to ``high``; without ``low`` itself if ``above``. NaN is in no range."""

    low: float
    high: float
    words: str
    """Completes "use a number ..."."""
    above: bool = False

    def has(self, value: float) -> bool:
        low = self.low * (1 - _ROUNDED) if self.low > 0 else self.low
        return low <= value <= self.high and not (self.above and value == self.low)


RANGES = {
    "temperature": Range(0.0, 2.0, "from 0 (greedy) to 2"),
    "top_p": Range(0.0, 1.0, "above 0, up to 1", above=True),
    "min_p": Range(0.0, 1.0, "from 0 (off) to 1"),
    # transformers and vLLM accept any number above 0. Far from 1, logits exceed the range of float32.
    "repetition_penalty": Range(0.01, 100.0, "from 0.01 to 100; 1 is none"),
    "presence_penalty": Range(-2.0, 2.0, "from -2 to 2"),
    "frequency_penalty": Range(-2.0, 2.0, "from -2 to 2"),
}
"""By option. The command line refuses other numbers before it starts anything, the gateway always."""

WARM = Range(1e-6, 2.0, "0 (greedy), or 1e-06 to 2")
"""Temperatures other than 0. Logits divided by a lower one may exceed the range of float32."""

BIASES = Range(-100.0, 100.0, "from -100 to 100")
"""The values of ``logit_bias``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Field names, meanings and defaults are those of the message. The defaults change nothing.

    An engine gets ``max_tokens`` and ``seed`` as numbers, and ``stop_token_ids`` with the model's own end
    tokens in it: the gateway has resolved them. The gateway applies ``stop``, ``ignore_eos``,
    ``skip_special_tokens``, ``include_stop_str`` and ``truncate_prompt_tokens`` itself, and gives the engine
    the tokens of ``bad_words``, since it has the tokenizer.
    ``workers/engine/decode/sampler.py`` says in which order the others apply.
    """

    max_tokens: int = 256
    """Of each choice. The gateway lowers the default where the model has fewer positions left."""
    n: int = 1
    """Choices: completions of the one prompt."""
    temperature: float = 0.0
    """0: greedy."""
    top_k: int = 0
    """0: all tokens."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Relative to the likeliest token's probability."""
    repetition_penalty: float = 1.0
    """Over prompt and completion."""
    presence_penalty: float = 0.0
    """Over the completion."""
    frequency_penalty: float = 0.0
    """Over the completion."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    logprobs: int | None = None
    """Alternatives to report beside each token's log-probability. None: report neither."""
    prompt_logprobs: int | None = None
    """Alternatives to report beside the log-probability of each token of the prompt. None: report neither."""
    seed: int = 0
    """The gateway draws one for a request without."""
    stop: Collection[str] = ()
    """The text ends before the first of these strings."""
    stop_token_ids: Collection[int] = frozenset()
    """A completion ends with any of these tokens."""
    ignore_eos: bool = False
    """Continue to ``max_tokens`` past the model's end tokens."""
    min_tokens: int = 0
    """No end token is drawn before the completion has so many tokens."""
    allowed_token_ids: Collection[int] = ()
    """Only these are drawn; empty: all."""
    bad_words: Collection[str] = ()
    """Texts that must not come."""
    truncate_prompt_tokens: int | None = None
    """Keep so many of the prompt's last tokens; None: all."""
    skip_special_tokens: bool = True
    """False: the names of special tokens are part of the text; not those that end the answer."""
    include_stop_str: bool = False
    """The text ends with the stop string instead of before it."""

    @classmethod
    def from_message(cls, message: Any) -> Self:
        """``message``: an ``inference_pb2.Sampling``; its unset fields become this class's defaults."""
        given: dict[str, Any] = {}
        for option in fields(cls):
            if message.DESCRIPTOR.fields_by_name[option.name].has_presence:
                if message.HasField(option.name):
                    given[option.name] = getattr(message, option.name)
            else:
                given[option.name] = getattr(message, option.name)
        given["logit_bias"] = dict(given["logit_bias"])
        given["stop"] = tuple(given["stop"])
        given["bad_words"] = tuple(given["bad_words"])
        given["allowed_token_ids"] = tuple(given["allowed_token_ids"])
        given["stop_token_ids"] = frozenset(given["stop_token_ids"])
        return cls(**given)
