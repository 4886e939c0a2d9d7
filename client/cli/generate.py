"""``farshore generate``: answers one prompt, and prints the answer as it is generated.

Called by ``main``. Starts a cluster for the call if no gateway runs. Must not know how a cluster works.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from farshore.client import events
from farshore.client.cli.connect import await_gateway
from farshore.client.cli.model_options import add_model_options
from farshore.client.cli.options import (
    DEFAULT_SERVER,
    add_cluster_options,
    add_server_option,
    cluster_config,
    no_gateway,
    whole,
)
from farshore.client.cli.sampling import add_sampling_options, asked
from farshore.client.cli.terminal import Progress, stop_signals
from farshore.client.sdk import Client
from farshore.errors import Cancelled, FarshoreError, InvalidRequest, TransportError
from farshore.model_spec import DEMO
from farshore.text import quoted

_CHAT = ("messages", "tools", "template_arguments", "add_generation_prompt", "continue_final_message")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "generate",
        help="answer one prompt",
        description="Answer one prompt. Uses the cluster that `farshore serve` runs; if none runs, starts "
        "one for this call.",
        epilog="examples:\n  farshore generate 'Why is the sky blue?'\n"
        "  farshore generate @long.txt --max-tokens 500 --json\n  git log | farshore generate --raw -",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "prompt", metavar="PROMPT", help="the text; - reads it from stdin, @FILE from a UTF-8 file"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--raw", action="store_true", help="send the text without the chat template")
    form.add_argument(
        "--chat",
        action="store_true",
        help=f"the text is JSON: a list of messages as OpenAI's, or an object with {', '.join(_CHAT)}",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object at the end: text, ids, timings, shards; with --n a list of choices",
    )
    add_server_option(
        parser,
        default=None,
        help="the gateway to use, or several of a cluster: with commas, or repeated; one must be running "
        f"(default: {DEFAULT_SERVER} if it is)",
    )
    parser.add_argument(
        "--model", help="the model to start, or that the server is expected to serve (default: smollm2, any)"
    )
    parser.add_argument(
        "--cache-salt",
        default="",
        metavar="TEXT",
        help="share stored prefixes with requests of the same salt only (default: with all that have none)",
    )
    parser.add_argument(
        "--priority",
        type=whole,
        default=0,
        metavar="N",
        help="while requests wait for memory, lower numbers start first (default: %(default)s)",
    )
    add_sampling_options(parser.add_argument_group("sampling"))
    started = parser.add_argument_group("only if a cluster is started")
    add_model_options(started)
    add_cluster_options(started)
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    sampling = asked(args)
    prompt = _prompt(args, read_prompt(args.prompt))
    progress = Progress()
    # A cluster that was started for this call must be ended after SIGTERM, too.
    with stop_signals() as take_signals:
        try:
            with _client(args, progress, take_signals) as client:
                _answer(client, args, prompt, sampling, progress)
        finally:
            progress.clear()
    return 0


def read_prompt(argument: str) -> str:
    """The prompt's text: ``argument`` itself, stdin for "-", a file for "@FILE". Raises InvalidRequest if it
    can't be read, is not UTF-8 or is blank."""
    where = "the prompt"
    try:
        if argument == "-":
            where = "stdin"
            text = sys.stdin.read()
        elif argument.startswith("@"):
            where = argument[1:]
            text = Path(where).read_text(encoding="utf-8")
        else:
            text = argument
    except OSError as error:
        raise InvalidRequest(
            f"{where or '@'}: can't be read: {error.strerror or error}; "
            "to send a text that begins with @, give it on stdin with -"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{where}: not UTF-8 text; convert it first") from error
    if not text.strip():
        raise InvalidRequest(f"{where} is empty: write something to answer")
    return text


def _prompt(args: argparse.Namespace, text: str) -> dict[str, Any]:
    """The prompt as arguments of ``Client.generate``. Raises InvalidRequest for --chat if ``text`` is no
    chat."""
    if args.raw:
        return {"prompt": text}
    if not args.chat:
        return {"messages": [{"role": "user", "content": text}]}
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"--chat: the text is no JSON: {error}") from error
    chat = given if isinstance(given, dict) else {"messages": given}
    if unknown := sorted(chat.keys() - set(_CHAT)):
        raise InvalidRequest(f"--chat: unknown field {quoted(unknown[0], 60)}: use {', '.join(_CHAT)}")
    if not isinstance(chat.get("messages"), list):
        raise InvalidRequest("--chat: give a list of messages, or an object with messages")
    return chat


@contextlib.contextmanager
def _client(
    args: argparse.Namespace, progress: Progress, take_signals: Callable[[], None]
) -> Iterator[Client]:
    """Yields a client of the running gateways, or of a cluster that lives as long as the context."""
    with Client(args.server or DEFAULT_SERVER) as client:
        if await_gateway(client, progress.step):
            progress.clear()
            yield client
            return
    if args.server:
        raise no_gateway(args.server)
    config = cluster_config(args, (), model=args.model or DEMO, port=0)
    # Imported here: Ray takes most of a second, which a call to a running gateway need not pay.
    from farshore.controller.driver.cluster import Cluster

    progress.note(
        f"farshore: no gateway at {DEFAULT_SERVER}: starting a cluster for this call (`farshore serve` keeps "
        "one)"
    )
    with Cluster.start(config, progress=progress.step) as cluster:
        take_signals()
        progress.clear()
        with Client(cluster.address) as client:
            yield client


class _Choice:
    """One choice of the answer: its tokens and its text so far."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.tokens: list[events.Token] = []

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def _answer(
    client: Client,
    args: argparse.Namespace,
    prompt: dict[str, Any],
    sampling: dict[str, Any],
    progress: Progress,
) -> None:
    """Generates and prints the answer. Raises Cancelled, after printing, if another client cancelled it."""
    stream = client.generate(
        **prompt, model=args.model or "", cache_salt=args.cache_salt, priority=args.priority, **sampling
    )
    choices = [_Choice() for _ in range(args.n or 1)]
    live = len(choices) == 1 and not args.json
    try:
        accepted, finished, scored = _follow(stream, choices, live=live, progress=progress)
    except FarshoreError as error:
        progress.clear()
        if live and choices[0].text:
            _write("\n")
        if error.retryable and any(choice.tokens for choice in choices):
            raise TransportError(f"{error}; the answer is incomplete: the same command asks again") from error
        raise
    progress.clear()
    if args.json:
        summary = _summary(accepted, finished, choices, logprobs=args.logprobs is not None)
        if args.prompt_logprobs is not None:
            summary["prompt_logprobs"] = [dataclasses.asdict(token) for token in scored]
        _write(json.dumps(summary | {"model": _model_name(client, args)}))
    elif live:
        _write(finished.text)
    else:
        _write("\n\n".join(f"[{index}] {choice.text}" for index, choice in enumerate(choices)))
    _write("\n")
    if any(end.reason == "cancelled" for end in finished.choices):
        raise Cancelled(
            "the answer was cancelled at the gateway and is incomplete: the same command asks again"
        )


def _follow(
    stream: Iterator[events.Event], choices: list[_Choice], *, live: bool, progress: Progress
) -> tuple[events.Accepted, events.Finished, list[events.PromptToken]]:
    """Reads the stream to its end and fills ``choices``; the third result are the prompt's tokens, if their
    log-probabilities were asked for. ``live``: print each token's text."""
    accepted = finished = None
    scored: list[events.PromptToken] = []
    for event in stream:
        if isinstance(event, events.Accepted):
            accepted, scored = event, []
        elif isinstance(event, events.Prefill):
            progress.update(f"reading the prompt: {event.done_tokens} of {event.total_tokens} tokens")
        elif isinstance(event, events.PromptLogprobs):
            scored += event.tokens
        elif isinstance(event, events.Token):
            choices[event.choice].tokens.append(event)
            choices[event.choice].pieces.append(event.text)
            if live:
                progress.clear()
                _write(event.text)
            else:
                progress.update(f"answering: {sum(len(choice.tokens) for choice in choices)} tokens")
        else:
            finished = event
            for choice, end in zip(choices, finished.choices, strict=True):
                choice.pieces.append(end.text)
    if accepted is None or finished is None:
        raise TransportError("the gateway ended the answer without finishing it")
    return accepted, finished, scored


def _write(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def _model_name(client: Client, args: argparse.Namespace) -> str | None:
    """The model's first name. If the gateway can't report it now, since the answer is printed all the same:
    the one that was asked for, or None."""
    try:
        return client.status().model
    except FarshoreError:
        return args.model


def _summary(
    accepted: events.Accepted, finished: events.Finished, choices: list[_Choice], *, logprobs: bool
) -> dict[str, Any]:
    """The JSON object. A single choice's fields stand at the top level, several choices in a list."""
    answers = [
        {
            "text": choice.text,
            "token_ids": [token.token_id for token in choice.tokens],
            "finish_reason": end.reason,
        }
        | ({"logprobs": [_logprob(token) for token in choice.tokens]} if logprobs else {})
        for choice, end in zip(choices, finished.choices, strict=True)
    ]
    several = {"choices": [{"index": index, **answer} for index, answer in enumerate(answers)]}
    return (answers[0] if len(answers) == 1 else several) | {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "cached_tokens": finished.cached_tokens,
        "ttft_ms": finished.ttft_ms,
        "tpot_ms": finished.tpot_ms,
        "queued_ms": finished.queued_ms,
        "total_ms": finished.total_ms,
        "shards": [dataclasses.asdict(shard) for shard in finished.shards],
        "request_id": accepted.request_id,
    }


def _logprob(token: events.Token) -> dict[str, Any]:
    return {
        "token_id": token.token_id,
        "text": token.text,
        "logprob": token.logprob,
        "top": [dataclasses.asdict(other) for other in token.top],
    }
