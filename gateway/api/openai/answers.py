"""Turns the events of requests into OpenAI-compatible objects: whole answers, and chunks of a stream.

Created by ``endpoints`` for each call. Must not know about HTTP, nor how requests are run.
"""

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from farshore.gateway.api.openai.calls import Call, Forced
from farshore.gateway.api.openai.logprobs import (
    chat_entry,
    completion_values,
    extend,
    name_of,
    no_values,
    prompt_entries,
)
from farshore.gateway.api.openai.parsing import ChoiceText, Parsing, Piece
from farshore.gateway.api.openai.schema import ChatBody, CompletionBody, NamedTool
from farshore.gateway.api.openai.translate import asks_for_echo_alone, has_structure
from farshore.models.tokenizer.tokenizer import Tokenizer
from farshore.proto import inference_pb2 as api

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

_REASONS = {
    api.FINISH_REASON_STOP: "stop",
    api.FINISH_REASON_LENGTH: "length",
    # vLLM's word: OpenAI's API has no cancellation.
    api.FINISH_REASON_CANCELLED: "abort",
}


class Answer(Protocol):
    """One call's answer. Its requests are numbered from 0; each has n choices."""

    def begin(self, number: int, *, prompt_end: str) -> None:
        """A request was accepted. ``prompt_end``: the last characters of its prompt."""

    def add(self, number: int, event: api.GenerateEvent) -> None:
        """Takes the next event of a request: a token, or its end."""

    def events(self) -> bytes:
        """The chunks that have become ready since the last call, as server-sent events. Use it, or
        :meth:`whole`."""

    def end(self) -> None:
        """All requests have ended."""

    def whole(self) -> dict[str, Any]:
        """The answer, after :meth:`end`."""


class _Usage:
    """Counts of all requests of a call."""

    def __init__(self) -> None:
        self._prompt = self._completion = self._cached = 0

    def add(self, usage: api.Usage, *, with_completion: bool = True) -> None:
        self._prompt += usage.prompt_tokens
        self._completion += usage.completion_tokens if with_completion else 0
        self._cached += usage.cached_tokens

    def as_object(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }


class _Base:
    """The base of both kinds of answer. ``model``: the name to show."""

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, body: ChatBody | CompletionBody, *, model: str, tokenizer: Tokenizer) -> None:
        options = body.stream_options
        self._streams = bool(body.stream)
        self._with_usage = bool(options and options.include_usage)
        self._with_running_usage = bool(options and options.continuous_usage_stats)
        self._n = body.n or 1
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self.usage = _Usage()
        self._name = name_of(tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self._tokenizer = tokenizer
        self._shows_prompt = body.prompt_logprobs is not None
        # All chunks begin alike.
        self._begin = f'data: {_encode({**self._head, "object": self.chunk_kind})[:-1]},"choices":['
        self._ready: list[str] = []

    def events(self) -> bytes:
        """See :class:`Answer`."""
        ready, self._ready = self._ready, []
        return "".join(ready).encode()

    def end(self) -> None:
        """All requests have ended."""
        if self._with_usage:
            self._ready.append(f'{self._begin}],"usage":{_encode(self.usage.as_object())}}}\n\n')

    def _add_chunk(self, choice: dict[str, Any]) -> None:
        """Adds a chunk of one choice; nothing for an answer that is sent whole."""
        if self._streams:
            self._ready.append(f"{self._begin}{_encode(choice)}]{self._running_usage()}}}\n\n")

    def _running_usage(self) -> str:
        if self._with_running_usage:
            return f',"usage":{_encode(self.usage.as_object())}'
        return ',"usage":null' if self._with_usage else ""

    def _whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.kind, "choices": choices, "usage": self.usage.as_object()}


@dataclass(slots=True)
class _ChatChoice:
    """The part of one choice of a chat that has come."""

    text: ChoiceText
    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    values: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""

    def message(self) -> dict[str, Any]:
        content = None if self.calls and not self.content else self.content
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = self.calls
        return message


class ChatAnswer(_Base):
    """An :class:`Answer` of /v1/chat/completions. It has one request."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, body: ChatBody, *, model: str, tokenizer: Tokenizer, parsing: Parsing) -> None:
        super().__init__(body, model=model, tokenizer=tokenizer)
        self._parsing = parsing
        self._logprobs = bool(body.logprobs)
        self._names = {tool.function.name for tool in body.tools or ()}
        self._most_calls = 1 if body.parallel_tool_calls is False else None
        if body.tool_choice == "none":
            self._names = set()
        self._tool_choice = body.tool_choice
        self._structured = has_structure(body)
        self._choices: list[_ChatChoice] = []
        self._prompt: list[dict[str, Any] | None] = []

    def begin(self, number: int, *, prompt_end: str) -> None:
        for index in range(self._n):
            text = ChoiceText(
                self._parsing,
                prompt_end=prompt_end,
                names=self._names,
                forced=self._new_forced(),
                structured=self._structured,
            )
            self._choices.append(_ChatChoice(text))
            self._emit(index, {"role": "assistant", "content": ""})

    def add(self, number: int, event: api.GenerateEvent) -> None:
        if event.HasField("token"):
            self._add_token(event.token)
        elif event.HasField("prompt_logprobs"):
            self._prompt += prompt_entries(event.prompt_logprobs.tokens)
        elif event.HasField("finished"):
            self.usage.add(event.finished.usage)
            for index, completion in enumerate(event.finished.choices):
                choice = self._choices[index]
                self._add_piece(index, choice.text.push(completion.text))
                self._add_piece(index, choice.text.finish())
                called = choice.calls and completion.reason == api.FINISH_REASON_STOP
                choice.reason = "tool_calls" if called else _REASONS[completion.reason]
                self._emit(index, {}, reason=choice.reason)

    def whole(self) -> dict[str, Any]:
        answer = self._whole(
            [
                {
                    "index": index,
                    "message": choice.message(),
                    "logprobs": {"content": choice.values} if self._logprobs else None,
                    "finish_reason": choice.reason,
                }
                for index, choice in enumerate(self._choices)
            ]
        )
        return answer | ({"prompt_logprobs": self._prompt} if self._shows_prompt else {})

    def _new_forced(self) -> Forced | None:
        if isinstance(self._tool_choice, NamedTool):
            return Forced(self._tool_choice.function.name)
        return Forced(None) if self._tool_choice == "required" else None

    def _add_token(self, token: api.Token) -> None:
        choice = self._choices[token.choice]
        values = [chat_entry(token, self._tokenizer, self._name)] if self._logprobs else []
        choice.values += values
        self._add_piece(token.choice, choice.text.push(token.text), values=values)

    def _add_piece(self, index: int, piece: Piece, *, values: Sequence[dict[str, Any]] = ()) -> None:
        choice = self._choices[index]
        choice.reasoning += piece.reasoning
        choice.content += piece.content
        if piece.reasoning:
            self._emit(index, {"reasoning_content": piece.reasoning})
        if piece.content or values:
            self._emit(index, {"content": piece.content}, values=list(values))
        for call in piece.calls:
            if self._most_calls is None or len(choice.calls) < self._most_calls:
                number = len(choice.calls)
                choice.calls.append(_called(call))
                self._emit(index, {"tool_calls": [{"index": number, **_called(call)}]})

    def _emit(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        values: list[dict[str, Any]] | None = None,
        reason: str | None = None,
    ) -> None:
        self._add_chunk(
            {
                "index": index,
                "delta": delta,
                "logprobs": {"content": values} if values else None,
                "finish_reason": reason,
            }
        )


class CompletionAnswer(_Base):
    """An :class:`Answer` of /v1/completions. Choice c of request r has the index r * n + c."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, body: CompletionBody, *, prompts: Iterable[str], model: str, tokenizer: Tokenizer
    ) -> None:
        """``prompts``: the text to begin each request's choices with; empty unless they are echoed."""
        super().__init__(body, model=model, tokenizer=tokenizer)
        self._logprobs = body.logprobs is not None
        self._most_alternatives = body.logprobs or 0
        self._echoes = bool(body.echo)
        self._only_echoes = asks_for_echo_alone(body)
        self._prompts = list(prompts)
        count = len(self._prompts) * self._n
        self._texts = [""] * count
        self._values = [no_values() for _ in range(count)]
        self._prompt_entries: list[list[dict[str, Any] | None]] = [[] for _ in self._prompts]
        self._prompt_streams = [tokenizer.stream() for _ in self._prompts]
        self._prompt_chars = [0] * len(self._prompts)
        self._reasons = [""] * count

    def begin(self, number: int, *, prompt_end: str) -> None:
        if self._prompts[number]:
            for index in range(number * self._n, (number + 1) * self._n):
                self._add_text(index, self._prompts[number])

    def add(self, number: int, event: api.GenerateEvent) -> None:
        first = number * self._n
        if event.HasField("token"):
            if not self._only_echoes:
                self._add_token(first + event.token.choice, event.token)
        elif event.HasField("prompt_logprobs"):
            self._add_prompt(number, event.prompt_logprobs.tokens)
        elif event.HasField("finished"):
            self.usage.add(event.finished.usage, with_completion=not self._only_echoes)
            for index, completion in enumerate(event.finished.choices, first):
                self._reasons[index] = _REASONS[completion.reason]
                text = "" if self._only_echoes else completion.text
                self._add_text(index, text, reason=self._reasons[index])

    def whole(self) -> dict[str, Any]:
        return self._whole(
            [
                _choice(index, text, self._values[index] if self._logprobs else None, self._reasons[index])
                | ({"prompt_logprobs": self._prompt_entries[index // self._n]} if self._shows_prompt else {})
                for index, text in enumerate(self._texts)
            ]
        )

    def _add_token(self, index: int, token: api.Token) -> None:
        values = None
        if self._logprobs:
            values = completion_values(
                token, self._name, offset=len(self._texts[index]), most=self._most_alternatives
            )
            extend(self._values[index], values)
        if token.text or values:
            self._add_text(index, token.text, values=values)

    def _add_text(
        self, index: int, text: str, *, values: dict[str, list[Any]] | None = None, reason: str | None = None
    ) -> None:
        self._texts[index] += text
        self._add_chunk(_choice(index, text, values, reason))

    def _add_prompt(self, number: int, tokens: Iterable[api.PromptToken]) -> None:
        """Takes tokens of a prompt. Those of an echo begin the log-probabilities of each of its choices;
        their text has been sent before."""
        self._prompt_entries[number] += prompt_entries(tokens)
        if not (self._echoes and self._logprobs):
            return
        values = no_values()
        for token in tokens:
            offset = self._prompt_chars[number]
            extend(values, completion_values(token, self._name, offset=offset, most=self._most_alternatives))
            self._prompt_chars[number] += len(self._prompt_streams[number].push(token.token_id))
        for index in range(number * self._n, (number + 1) * self._n):
            extend(self._values[index], values)
            self._add_text(index, "", values=values)


def _called(call: Call) -> dict[str, Any]:
    """OpenAI's object of a call."""
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _choice(index: int, text: str, values: dict[str, list[Any]] | None, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": values, "finish_reason": reason}
