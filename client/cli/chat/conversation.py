"""A conversation: the system prompt, and questions with their answers.

Used by ``command``. A question enters together with its answer, so that a failed turn leaves no trace. Must
not know how answers are made.
"""

import json
from pathlib import Path

from farshore.errors import InvalidRequest


class Conversation:
    """``system``: the system prompt; None: the chat template's own, if it has one."""

    def __init__(self, system: str | None) -> None:
        self.system = system
        self._messages: list[dict[str, str]] = []

    def with_question(self, question: str) -> list[dict[str, str]]:
        """The messages to send, in OpenAI's shape."""
        return [*self.messages, {"role": "user", "content": question}]

    def add(self, question: str, answer: str) -> None:
        self._messages = [
            *self._messages,
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]

    def reset(self) -> None:
        """Forgets all but the system prompt."""
        self._messages = []

    @property
    def messages(self) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + self._messages

    def save(self, file: str) -> int:
        """Writes the messages as JSON, as ``farshore generate --chat @FILE`` reads them, and returns how many
        they are. Raises InvalidRequest if ``file`` exists, or can't be written."""
        try:
            with Path(file).expanduser().open("x", encoding="utf-8") as target:
                json.dump(self.messages, target, indent=1)
                target.write("\n")
        except FileExistsError as error:
            raise InvalidRequest(f"{file} exists: choose another name") from error
        except (OSError, ValueError, RuntimeError) as error:  # ValueError: a null byte; RuntimeError: no home
            why = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise InvalidRequest(f"{file or 'the name'}: can't be written: {why}") from error
        return len(self.messages)
