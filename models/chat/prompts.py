"""Makes prompts of conversations: a model's chat template and its tokenizer together.

Called by the gateway's validation, in its tokenizing threads. A control token that a user typed stays text
unless the model is served with ``special_tokens_in_chat="parse"``. It must not know about requests' wire
format.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from farshore.errors import InvalidRequest, ModelError
from farshore.model_spec import SpecialTokens
from farshore.models.chat.processes import Rendered, TemplateProcesses
from farshore.models.tokenizer.literal import LiteralEncoder
from farshore.models.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What a chat template renders, in OpenAI's shapes.

    ``messages``: each has a ``role`` and may have ``content`` (a string or parts, each ``{"type": "text",
    "text": …}``), ``tool_calls`` (``{"id", "type", "function": {"name", "arguments"}}``), ``tool_call_id``,
    ``name`` and ``reasoning_content``. ``tools``, a tool call's ``arguments`` and ``template_arguments`` are
    JSON objects, as text or as values. ``continue_final_message``: the prompt ends within the last message.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any] | str] = ()
    template_arguments: Mapping[str, Any] | str = ""
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class ChatPrompts:
    """Renders and encodes conversations for one model. Thread-safe. Owns processes: ``close`` ends them, as
    does the end of this object or of this process."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        template: str | Mapping[str, str] | None = None,
        where: str | None = None,
        stop_ids: Sequence[int] = (),
        special_tokens_in_chat: SpecialTokens = "text",
    ) -> None:
        """Starts a process in the background. ``template``: Jinja source, or several by name; None: the
        tokenizer's own. ``where``: its origin, for messages; None: the tokenizer's name. ``stop_ids``: ids
        that end an answer, besides the tokenizer's own: those among its added tokens are control tokens even
        if they are not declared special."""
        self._tokenizer = tokenizer
        self._mark = special_tokens_in_chat == "text"
        self._literal = LiteralEncoder(tokenizer.backend, tokenizer.control_ids(stop_ids))
        self._processes = None
        template = template or tokenizer.chat_template
        if template is not None:
            greeting = {
                "templates": {"default": template} if isinstance(template, str) else template,
                "special_tokens": tokenizer.special_tokens,
                "control_tokens": self._literal.names,
            }
            self._processes = TemplateProcesses(greeting, where=where or tokenizer.name)

    def await_compiled(self) -> None:
        """Blocks until the chat template is compiled, if there is one. Raises ModelError if it is not
        valid."""
        if self._processes is not None:
            self._processes.await_compiled()

    def close(self) -> None:
        """Ends the processes. Idempotent."""
        if self._processes is not None:
            self._processes.close()

    def render(self, conversation: Conversation, *, most_chars: int) -> str:
        """The prompt's text. Raises as ``encode`` does."""
        return self._render(conversation, most_chars, mark=False).text

    def encode(self, conversation: Conversation, *, most_chars: int) -> list[int]:
        """Ids of the prompt, which has at most ``most_chars`` characters.

        Raises ModelError if the model has no chat template, InvalidRequest if the template refuses the
        conversation, fails on it or exceeds a limit.
        """
        rendered = self._render(conversation, most_chars, mark=self._mark)
        if not rendered.named:
            ids = self._tokenizer.encode(rendered.text, add_special_tokens=False)
            if not self._mark or self._literal.count(ids) <= rendered.control_tokens:
                return ids
            # A normaliser has made a control token of other text, as of full-width letters.
            rendered = self._render(conversation, most_chars, mark=True, named=True)
        return self._literal.encode(rendered.text)

    def _render(
        self, conversation: Conversation, most_chars: int, *, mark: bool, named: bool = False
    ) -> Rendered:
        if self._processes is None:
            raise ModelError(
                f"{self._tokenizer.name}: has no chat template; send a plain prompt, or use an instruct model"
            )
        continued = conversation.continue_final_message
        if continued and conversation.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message goes on with the last message and add_generation_prompt begins a new "
                "one: set only one of them"
            )
        request = {name: getattr(conversation, name) for name in Conversation.__slots__}
        return self._processes.render(request | {"most_chars": most_chars, "mark": mark, "named": named})
