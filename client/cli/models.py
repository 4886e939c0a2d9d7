"""``farshore tokenize``, ``detokenize`` and ``models``: what a running gateway says of its model.

Called by ``main``. Must not know anything but the SDK.
"""

import argparse
import dataclasses
import json
from typing import Any

from farshore.client.cli.connect import connected
from farshore.client.cli.options.gateway import add_gateway_options
from farshore.client.cli.options.prompts import add_chat_option, add_prompt, chat_of, read_text
from farshore.client.cli.options.values import whole
from farshore.client.cli.terminal import table, write
from farshore.errors import InvalidRequest


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    tokenize = commands.add_parser(
        "tokenize",
        help="show the token ids of a text or a chat",
        description="Print the token ids that the model reads for a text, with the special tokens that a "
        "prompt gets, or for a chat.",
        epilog="example: farshore tokenize 'Why is the sky blue?'",
    )
    add_prompt(tokenize)
    add_chat_option(tokenize)
    tokenize.add_argument(
        "--no-special-tokens", action="store_true", help="the text alone, without a beginning or an end"
    )
    tokenize.set_defaults(run=run_tokenize)
    detokenize = commands.add_parser(
        "detokenize",
        help="show the text of token ids",
        description="Print the text of token ids, without special tokens.",
        epilog="example: farshore tokenize 'Hello' | farshore detokenize -",
    )
    detokenize.add_argument(
        "ids", nargs="+", metavar="ID", help="the ids; - reads them from stdin, with blanks between them"
    )
    detokenize.set_defaults(run=run_detokenize)
    models = commands.add_parser(
        "models",
        help="list the names by which requests may call the model",
        description="List the names by which requests may call the model, or describe one of them.",
        epilog="example: farshore models --json",
    )
    models.add_argument(
        "name", nargs="?", metavar="NAME", help="only this one; it is an error if there is none"
    )
    models.set_defaults(run=run_models)
    for parser in (tokenize, detokenize, models):
        add_gateway_options(parser)
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        if parser is not models:
            parser.add_argument("--model", default="", help="a name that the server is expected to serve")
        parser.set_defaults(usage_error=parser.error)


def run_tokenize(args: argparse.Namespace) -> int:
    if args.chat and args.no_special_tokens:
        args.usage_error("--no-special-tokens is for a text: the special tokens of a chat are its template's")
    text = read_text(args.prompt)
    prompt: dict[str, Any] = chat_of(text) if args.chat else {"prompt": text}
    with connected(args) as client:
        ids = client.tokenize(**prompt, model=args.model, add_special_tokens=not args.no_special_tokens)
    _print(args, {"count": len(ids), "ids": ids}, " ".join(map(str, ids)))
    return 0


def run_detokenize(args: argparse.Namespace) -> int:
    words = read_text("-").split() if args.ids == ["-"] else args.ids
    try:
        ids = [whole(word) for word in words]
    except argparse.ArgumentTypeError as error:
        raise InvalidRequest(f"{error}: give token ids, such as 504 3575") from error
    with connected(args) as client:
        text = client.detokenize(ids, model=args.model)
    _print(args, {"text": text}, text)
    return 0


def run_models(args: argparse.Namespace) -> int:
    with connected(args) as client:
        models = client.models() if args.name is None else (client.model(args.name),)
    facts = [dataclasses.asdict(model) for model in models]
    header = ("NAME", "MODEL", "POSITIONS", "VOCABULARY")
    lines = table(header, [list(model.values()) for model in facts])
    _print(args, {"models": facts}, "\n".join(lines))
    return 0


def _print(args: argparse.Namespace, facts: dict[str, Any], text: str) -> None:
    write(f"{json.dumps(facts) if args.json else text}\n")
