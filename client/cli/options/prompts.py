"""The prompt that a command is given: an argument, a file or stdin; a text or a chat in JSON.

Used by ``generate``, ``chat`` and ``models``. Must not know what becomes of the prompt.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from farshore.errors import InvalidRequest
from farshore.text import quoted

CHAT_FIELDS = ("messages", "tools", "template_arguments", "add_generation_prompt", "continue_final_message")


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """Adds the argument that :func:`read_text` reads."""
    parser.add_argument(
        "prompt", metavar="PROMPT", help="the text; - reads it from stdin, @FILE from a file; both in UTF-8"
    )


def add_chat_option(group: "argparse.ArgumentParser | argparse._MutuallyExclusiveGroup") -> None:
    group.add_argument(
        "--chat",
        action="store_true",
        help=f"the text is JSON: a list of messages as OpenAI's, or an object with {', '.join(CHAT_FIELDS)}",
    )


def add_cache_salt_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache-salt",
        default="",
        metavar="TEXT",
        help="share stored prefixes with requests of the same salt only (default: with all that have none)",
    )


def read_prompt(argument: str) -> str:
    """As :func:`read_text`; raises InvalidRequest also for a text that is blank."""
    text = read_text(argument)
    if not text.strip():
        where = "stdin" if argument == "-" else argument[1:] if argument.startswith("@") else "the prompt"
        raise InvalidRequest(f"{where} is empty: write something to answer")
    return text


def read_text(argument: str) -> str:
    """The text: ``argument`` itself, stdin for "-", a file for "@FILE". Raises InvalidRequest if it can't be
    read or is not UTF-8."""
    where = "stdin" if argument == "-" else argument[1:]
    try:
        if argument == "-":
            if sys.stdin is None:
                raise InvalidRequest("stdin is closed: give the text as an argument, or as @FILE")
            return sys.stdin.read()
        return Path(where).read_text(encoding="utf-8") if argument.startswith("@") else argument
    except OSError as error:
        raise InvalidRequest(
            f"{where or '@'}: can't be read: {error.strerror or error}; "
            "to send a text that begins with @, give it on stdin with -"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{where}: not UTF-8 text; convert it first") from error


def chat_of(text: str) -> dict[str, Any]:
    """A chat in JSON as arguments of ``Client.generate``. Raises InvalidRequest if ``text`` is none."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"--chat: the text is no JSON: {error}") from error
    chat = given if isinstance(given, dict) else {"messages": given}
    if unknown := sorted(chat.keys() - set(CHAT_FIELDS)):
        raise InvalidRequest(f"--chat: unknown field {quoted(unknown[0], 60)}: use {', '.join(CHAT_FIELDS)}")
    if not isinstance(chat.get("messages"), list):
        raise InvalidRequest("--chat: give a list of messages, or an object with messages")
    return chat
