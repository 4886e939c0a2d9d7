"""``farshore chat``: a conversation at the terminal, or one turn a line of stdin.

Called by ``main``. Starts a cluster for the call if no gateway runs. Must not know how a cluster works.
"""

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

from farshore.client import events
from farshore.client.cli.chat.conversation import Conversation
from farshore.client.cli.chat.lines import Lines
from farshore.client.cli.connect import running_or_own
from farshore.client.cli.options.cluster import add_own_cluster_options
from farshore.client.cli.options.prompts import add_cache_salt_option, read_text
from farshore.client.cli.options.sampling import add_sampling_options, asked
from farshore.client.cli.reading import reading
from farshore.client.cli.terminal import (
    Interrupted,
    Progress,
    interrupts,
    stop_signals,
    write,
)
from farshore.client.sdk import Client
from farshore.errors import FarshoreError, InvalidRequest

_HELP = """\
/help         show this
/system TEXT  set the system prompt; without TEXT, show it
/reset        forget the conversation, but not the system prompt
/save FILE    write the conversation as JSON: farshore generate --chat @FILE goes on with it
/quit         leave; so does Ctrl-D
\\             at the end of a line: the next line belongs to it
//            at the beginning: a text that begins with one /
Ctrl-C        ends an answer; what it has stays in the conversation"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "chat",
        help="have a conversation",
        description="Have a conversation: each answer knows what came before. Uses the cluster that\n"
        "`farshore serve` runs; if none runs, starts one for this call. Where stdin is no\n"
        "terminal, every line is a turn, and the first that fails ends the command.",
        epilog=f"example:\n  farshore chat --system 'Answer in one sentence.'\n\nin the chat:\n{_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--system", metavar="TEXT", help="the system prompt; @FILE from a UTF-8 file")
    add_cache_salt_option(parser)
    add_sampling_options(parser.add_argument_group("sampling"), one_answer=True)
    add_own_cluster_options(parser)
    parser.set_defaults(
        run=run, usage_error=parser.error, json=False, n=None, logprobs=None, prompt_logprobs=None
    )


def run(args: argparse.Namespace) -> int:
    options = asked(args)
    if args.system == "-":
        args.usage_error("--system -: stdin has the turns; give the text, or @FILE")
    conversation = Conversation(None if args.system is None else read_text(args.system))
    progress = Progress()
    with stop_signals() as take_signals:
        try:
            with running_or_own(args, progress, take_signals) as client:
                _Chat(client, conversation, progress, options).go_on()
        finally:
            progress.clear()
    return 0


class _Quit(Exception):
    pass


class _Chat:
    """``options``: arguments of ``Client.generate`` for each answer."""

    def __init__(
        self, client: Client, conversation: Conversation, progress: Progress, options: dict[str, Any]
    ) -> None:
        self._client = client
        self._conversation = conversation
        self._progress = progress
        self._options = options
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/system": self._system,
            "/reset": self._reset,
            "/save": self._save,
            "/quit": self._quit,
        }

    def go_on(self) -> None:
        """Reads and answers turns to the end. Raises the errors of a turn that was not typed."""
        lines = Lines()
        if lines.typed:
            self._progress.note("/help shows what you can type; Ctrl-D leaves")
        with interrupts() if lines.typed else contextlib.nullcontext():
            while True:
                try:
                    self._turn(lines.read())
                except EOFError:
                    if lines.typed:
                        self._progress.note("")
                    return
                except _Quit:
                    return
                except Interrupted:  # At the prompt: as shells do.
                    self._progress.note("")
                except FarshoreError as error:
                    self._progress.clear()
                    if not lines.typed:
                        raise
                    self._progress.note(f"farshore: error: {' '.join(str(error).split())}")

    def _turn(self, text: str) -> None:
        if not text.strip():
            return
        if text.startswith("//"):
            text = text[1:]
        elif text.startswith("/"):
            name, _, rest = text.partition(" ")
            if name.rstrip() not in self._commands:
                raise InvalidRequest(
                    f"no command {name.rstrip()!r}: /help shows them; to send a text that begins with /, "
                    "begin with //"
                )
            return self._commands[name.rstrip()](rest.strip())
        answer = _Answer(self._progress)
        messages = self._conversation.with_question(text)
        with reading(self._client, lambda own: own.generate(messages=messages, **self._options)) as stream:
            answer.follow(stream)
        if answer.text:
            self._conversation.add(text, answer.text)

    def _help(self, _: str) -> None:
        self._progress.note(_HELP)

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = text
        else:
            shown = self._conversation.system
            self._progress.note("(the chat template's own)" if shown is None else shown)

    def _reset(self, _: str) -> None:
        self._conversation.reset()

    def _save(self, file: str) -> None:
        if not file:
            raise InvalidRequest("/save: name a file, such as /save chat.json")
        self._progress.note(f"saved {self._conversation.save(file)} messages in {file}")

    def _quit(self, _: str) -> None:
        raise _Quit


class _Answer:
    """An answer that is printed as it comes. ``text``: what has come."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.text = ""

    def follow(self, stream: Any) -> None:
        """Reads the stream to its end, or to Ctrl-C. Raises the gateway's errors, after a partial answer's
        end of line."""
        why = ""
        try:
            for event in stream:
                if isinstance(event, events.Prefill):
                    self._progress.update(
                        f"reading the conversation: {event.done_tokens} of {event.total_tokens} tokens"
                    )
                elif isinstance(event, events.Token):
                    self._add(event.text)
                elif isinstance(event, events.Finished):
                    self._add(event.text)
                    why = {
                        "stop": "",
                        "length": "the answer reached --max-tokens or the longest context",
                    }.get(event.reason, "another client cancelled the answer")
        except Interrupted:
            why = "stopped"
        finally:
            self._progress.clear()
            if self.text:
                write("\n")
        if why:
            self._progress.note(f"({why})")

    def _add(self, text: str) -> None:
        if text:
            self._progress.clear()
            self.text += text
            write(text)
