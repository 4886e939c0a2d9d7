"""``farshore generate``: one prompt, its answer on stdout as it comes.

Called by ``cli``. Starts a cluster for the one call if none is running. Must not know how clusters work.
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
from farshore.client.cli_options import (
    DEFAULT_SERVER,
    DEMO_MODEL,
    add_cluster_options,
    cluster_config,
    no_gateway,
    positive,
    seed,
    temperature,
    top_p,
)
from farshore.client.cli_terminal import Progress, stop_signals
from farshore.client.sdk import Client
from farshore.errors import FarshoreError, InvalidRequest, TransportError


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
    parser.add_argument("--raw", action="store_true", help="send the text without the chat template")
    parser.add_argument(
        "--max-tokens", type=positive, metavar="N", help="most tokens to answer (default: 256)"
    )
    parser.add_argument("--temperature", type=temperature, metavar="T", help="0 (greedy) to 2 (default: 0)")
    parser.add_argument(
        "--top-p",
        type=top_p,
        metavar="P",
        help="with a temperature: sample from the likeliest tokens of this total probability",
    )
    parser.add_argument(
        "--seed", type=seed, metavar="N", help="with a temperature: repeat a sampled answer (default: random)"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object at the end: text, ids, timings, shards",
    )
    parser.add_argument(
        "--server",
        metavar="HOST:PORT",
        help=f"the gateway to use; must be running (default: {DEFAULT_SERVER} if it is)",
    )
    parser.add_argument(
        "--model", help="the model to start, or that the server is expected to serve (default: smollm2, any)"
    )
    add_cluster_options(parser.add_argument_group("only if a cluster is started"))
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    prompt = read_prompt(args.prompt)
    progress = Progress()
    # SIGTERM, too, must end a cluster of our own.
    with stop_signals() as take_signals:
        try:
            with _gateway(args, progress, take_signals) as address, Client(address) as client:
                _answer(client, args, prompt, progress)
        finally:
            progress.clear()
    return 0


def read_prompt(argument: str) -> str:
    """Raises InvalidRequest for one that can't be read or has nothing in it."""
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


@contextlib.contextmanager
def _gateway(args: argparse.Namespace, progress: Progress, take_signals: Callable[[], None]) -> Iterator[str]:
    """The address to ask: a running gateway's, or that of a cluster which ends with this call."""
    address = args.server or DEFAULT_SERVER
    with Client(address) as probe:
        serving = probe.is_serving()
    if serving:
        yield address
        return
    if args.server:
        raise no_gateway(address)
    config = cluster_config(args, (), model=args.model or DEMO_MODEL, port=0)
    # Imported here: Ray takes most of a second, which a call to a running gateway need not pay.
    from farshore.controller.cluster import Cluster

    progress.note(
        f"farshore: no gateway at {address}: starting a cluster for this call (`farshore serve` keeps one)"
    )
    with Cluster.start(config, progress=progress.step) as cluster:
        take_signals()
        progress.clear()
        yield cluster.address


def _answer(client: Client, args: argparse.Namespace, prompt: str, progress: Progress) -> None:
    asked = {"prompt": prompt} if args.raw else {"messages": [{"role": "user", "content": prompt}]}
    stream = client.generate(
        **asked,
        model=args.model or "",
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    pieces: list[str] = []
    token_ids: list[int] = []
    accepted = finished = None
    for event in stream:
        if isinstance(event, events.Accepted):
            accepted = event
        elif isinstance(event, events.Prefill):
            progress.update(f"reading the prompt: {event.done_tokens} of {event.total_tokens} tokens")
        else:
            progress.clear()
            pieces.append(event.text)
            if isinstance(event, events.Finished):
                finished = event
            else:
                token_ids.append(event.token_id)
            if event.text and not args.json:
                sys.stdout.write(event.text)
                sys.stdout.flush()
    if accepted is None or finished is None:
        raise TransportError(f"gateway {client.address} ended the answer without finishing it")
    if args.json:
        print(
            json.dumps(_summary(_model_name(client, args), accepted, finished, "".join(pieces), token_ids)),
            flush=True,
        )
    else:
        print(flush=True)


def _model_name(client: Client, args: argparse.Namespace) -> str | None:
    """None if nobody can tell: an answer is worth printing without it."""
    if args.model:
        return args.model
    try:
        return client.status().model
    except FarshoreError:
        return None


def _summary(
    model: str | None,
    accepted: events.Accepted,
    finished: events.Finished,
    text: str,
    token_ids: list[int],
) -> dict[str, Any]:
    return {
        "text": text,
        "token_ids": token_ids,
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "finish_reason": finished.reason,
        "ttft_ms": finished.ttft_ms,
        "tpot_ms": finished.tpot_ms,
        "queued_ms": finished.queued_ms,
        "total_ms": finished.total_ms,
        "shards": [dataclasses.asdict(shard) for shard in finished.shards],
        "request_id": accepted.request_id,
        "model": model,
    }
