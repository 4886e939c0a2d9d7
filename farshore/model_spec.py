"""What a cluster is asked to load: the model and the options that change how it is read.

Made by the command line, carried by ``ClusterConfig`` and ``DenseConfig``, and sent to the gateway's process
as JSON, so that every process loads the same model in the same way. It must not read files or import anything
heavy: the command line of a client without the server imports it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import PurePath
from typing import Any, Literal, Self, get_args

from farshore.errors import InvalidRequest
from farshore.text import quoted

DEMO = "smollm2"
"""The name of the demo model."""

AUTO, NO_GENERATION_CONFIG = "auto", "none"
"""Values of ``generation_config`` besides paths."""

SpecialTokens = Literal["text", "parse"]
ToolCallParser = Literal["auto", "none", "hermes", "llama3", "mistral"]
ReasoningParser = Literal["auto", "none", "think"]

LEAST_MODEL_LEN, MOST_MODEL_LEN = 2, 1 << 30
"""A token of the prompt and one of the answer, at least."""
MOST_NAME_CHARS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Raises InvalidRequest, with the option's name and the fix, for values that can't work. The field names
    are those of the options of ``farshore serve``, except ``served_names`` (``--served-model-name``)."""

    model: str = DEMO
    """A directory, a ``.gguf`` file, a hub id, or the name of the demo model: ``source.resolve`` takes it."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; None: its main branch."""
    tokenizer: str | None = None
    """Where to read the tokenizer instead of the model's own, as ``source.resolve_tokenizer`` takes it."""
    chat_template: str | None = None
    """Path of a Jinja file that replaces the model's own chat template."""
    generation_config: str = AUTO
    """Where the sampling of requests that leave it open comes from: "auto", the model's own files; "none",
    nowhere; else the path of a generation_config.json, or of its folder."""
    max_model_len: int | None = None
    """Longest prompt and answer together, in tokens. None: the positions that the model's files name."""
    rope_scaling: Mapping[str, Any] | None = None
    """Replaces the scaling of the rotary embedding that the model's files name; in the form of
    config.json."""
    served_names: tuple[str, ...] = ()
    """Names that requests may give the model; answers and status show the first. Empty: see :attr:`names`."""
    special_tokens_in_chat: SpecialTokens = "text"
    """How a special token that is written in a chat message is read: as text, or as the token itself."""
    tool_call_parser: ToolCallParser = "auto"
    """The format of the tool calls in the model's answers; auto: by its chat template."""
    reasoning_parser: ReasoningParser = "auto"
    """Whether ``<think>…</think>`` in an answer is reasoning; auto: if the chat template writes it."""

    def __post_init__(self) -> None:
        for option in ("model", "revision", "tokenizer", "chat_template", "generation_config"):
            if getattr(self, option) == "":
                raise InvalidRequest(f"--{option.replace('_', '-')} is empty: give a value, or leave it out")
        if self.max_model_len is not None and not LEAST_MODEL_LEN <= self.max_model_len <= MOST_MODEL_LEN:
            raise InvalidRequest(
                f"--max-model-len {self.max_model_len}: use {LEAST_MODEL_LEN} to {MOST_MODEL_LEN} tokens"
            )
        if self.rope_scaling is not None:
            _check_rope_scaling(self.rope_scaling)
        for name in self.served_names:
            if not name or len(name) > MOST_NAME_CHARS or not name.isprintable() or " " in name:
                raise InvalidRequest(
                    f"--served-model-name {quoted(name)}: use 1 to {MOST_NAME_CHARS} characters, no spaces"
                )
        for option, choices in (
            ("special_tokens_in_chat", get_args(SpecialTokens)),
            ("tool_call_parser", get_args(ToolCallParser)),
            ("reasoning_parser", get_args(ReasoningParser)),
        ):
            if (value := getattr(self, option)) not in choices:
                raise InvalidRequest(f"--{option.replace('_', '-')} {value}: use one of {', '.join(choices)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Every name by which requests may call the model, the one to show first. Without ``served_names``:
        the model as it was given, and the last component of its path or id without ``.gguf``."""
        alias = PurePath(self.model).name.removesuffix(".gguf")
        given = self.served_names or (self.model, alias or self.model)
        return tuple(dict.fromkeys(given))

    @property
    def name(self) -> str:
        """The model's name in answers and status."""
        return self.names[0]

    def to_json(self) -> str:
        """The spec as one JSON object, for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The spec that :meth:`to_json` wrote; absent fields get their defaults. Raises InvalidRequest for
        anything else than an object of these fields."""
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"the model's options are not JSON: {quoted(text)}") from error
        known = {field.name for field in fields(cls)}
        if not isinstance(given, dict) or not known.issuperset(given):
            raise InvalidRequest(f"the model's options must be an object of {', '.join(sorted(known))}")
        try:
            return cls(**given | {"served_names": tuple(given.get("served_names", ()))})
        except TypeError as error:
            raise InvalidRequest(f"the model's options have a value of another type: {error}") from error


def _check_rope_scaling(given: Mapping[str, Any]) -> None:
    example = """'{"rope_type": "yarn", "factor": 4.0}'"""
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"--rope-scaling {quoted(repr(given))}: give a JSON object, such as {example}")
    if not isinstance(given.get("rope_type", given.get("type")), str):
        raise InvalidRequest(f"--rope-scaling lacks the kind of scaling: name a rope_type, as in {example}")
