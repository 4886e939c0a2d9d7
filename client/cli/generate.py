"""``farshore generate``: answers one prompt, and prints the answer as it is generated.

Called by ``main``. Starts a cluster for the call if no gateway runs. Must not know how a cluster works.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from farshore.client import events
from farshore.client.cli.connect import running_or_own
from farshore.client.cli.options.cluster import add_own_cluster_options
from farshore.client.cli.options.prompts import (
    add_cache_salt_option,
    add_chat_option,
    add_prompt,
    chat_of,
    read_prompt,
)
from farshore.client.cli.options.sampling import add_sampling_options, add_structure_options, asked, structure
from farshore.client.cli.options.values import whole
from farshore.client.cli.reading import reading
from farshore.client.cli.terminal import Progress, stop_signals, write
from farshore.client.sdk import Client
from farshore.errors import Cancelled, FarshoreError, TransportError


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
    add_prompt(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--raw", action="store_true", help="send the text without the chat template")
    add_chat_option(form)
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object at the end: text, ids, timings, shards; with --n a list of choices",
    )
    add_cache_salt_option(parser)
    parser.add_argument(
        "--priority",
        type=whole,
        default=0,
        metavar="N",
        help="while requests wait for memory, lower numbers start first (default: %(default)s)",
    )
    add_sampling_options(parser.add_argument_group("sampling"))
    add_structure_options(parser)
    add_own_cluster_options(parser)
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    options = asked(args) | structure(args) | {"priority": args.priority}
    text = read_prompt(args.prompt)
    if args.chat:
        prompt = chat_of(text)
    else:
        prompt = {"prompt": text} if args.raw else {"messages": [{"role": "user", "content": text}]}
    progress = Progress()
    # A cluster that was started for this call must be ended after SIGTERM, too.
    with stop_signals() as take_signals:
        try:
            with running_or_own(args, progress, take_signals) as client:
                _answer(client, args, prompt, options, progress)
        finally:
            progress.clear()
    return 0


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
    options: dict[str, Any],
    progress: Progress,
) -> None:
    """Generates and prints the answer. ``prompt``, ``options``: arguments of ``Client.generate``. Raises
    Cancelled, after printing, if another client cancelled it."""
    choices = [_Choice() for _ in range(args.n or 1)]
    live = len(choices) == 1 and not args.json
    try:
        with reading(client, lambda own: own.generate(**prompt, **options)) as stream:
            accepted, finished, scored = _follow(stream, choices, live=live, progress=progress)
    except FarshoreError as error:
        progress.clear()
        if live and choices[0].text:
            write("\n")
        if error.retryable and any(choice.tokens for choice in choices):
            raise TransportError(f"{error}; the answer is incomplete: the same command asks again") from error
        raise
    progress.clear()
    if args.json:
        summary = _summary(accepted, finished, choices, logprobs=args.logprobs is not None)
        if args.prompt_logprobs is not None:
            summary["prompt_logprobs"] = [dataclasses.asdict(token) for token in scored]
        write(json.dumps(summary | {"model": _model_name(client, args)}))
    elif live:
        write(finished.text)
    else:
        write("\n\n".join(f"[{index}] {choice.text}" for index, choice in enumerate(choices)))
    write("\n")
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
                write(event.text)
            else:
                progress.update(f"answering: {sum(len(choice.tokens) for choice in choices)} tokens")
        else:
            finished = event
            for choice, end in zip(choices, finished.choices, strict=True):
                choice.pieces.append(end.text)
    if accepted is None or finished is None:
        raise TransportError("the gateway ended the answer without finishing it")
    return accepted, finished, scored


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
