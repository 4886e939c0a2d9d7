"""The sampling options of ``farshore generate`` and ``chat``, the structure options of ``generate``, and all
their options as arguments of the SDK.

Used by ``generate`` and ``chat``. Checks ranges, as the gateway does, so that a wrong value is reported
before a cluster is started for the call. Must not know how the values are used.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from farshore.client.cli.options.prompts import read_text
from farshore.client.cli.options.values import number, positive, whole
from farshore.errors import InvalidRequest
from farshore.sampling import BIASES, RANGES, Range, Sampling


def seed(text: str) -> int:
    value = whole(text)
    if not 0 <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"{text}: use a whole number from 0 to 2**64 - 1")
    return value


def in_range(allowed: Range) -> Callable[[str], float]:
    """A type for argparse: the numbers of the range."""

    def parse(text: str) -> float:
        value = number(text)
        if not allowed.has(value):
            raise argparse.ArgumentTypeError(f"{text}: use a number {allowed.words}")
        return value

    return parse


def not_negative(text: str) -> int:
    value = whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: use a whole number from 0 on")
    return value


def bias(text: str) -> tuple[int, float]:
    token, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: write TOKEN=BIAS, such as 42=-100")
    return not_negative(token), in_range(BIASES)(value)


def add_sampling_options(group: argparse._ArgumentGroup, *, one_answer: bool = False) -> None:
    """``one_answer``: leave out the options of several answers, and of JSON."""
    add = group.add_argument
    add(
        "--max-tokens",
        type=positive,
        metavar="N",
        help="most tokens to answer (default: the model's, or 256)",
    )
    if not one_answer:
        add("--n", type=positive, metavar="N", help="choices: answers to the one prompt (default: 1)")
        add(
            "--logprobs",
            type=not_negative,
            metavar="N",
            help="with --json: each token's log-probability, and those of N alternatives",
        )
        add(
            "--prompt-logprobs",
            type=not_negative,
            metavar="N",
            help="with --json: the same for each token of the prompt",
        )
    add(
        "--temperature",
        type=in_range(RANGES["temperature"]),
        metavar="T",
        help="0 (greedy) to 2 (default: the model's, or 0)",
    )
    add(
        "--top-k",
        type=not_negative,
        metavar="K",
        help="sample from the K likeliest tokens (default: the model's, or all)",
    )
    add(
        "--top-p",
        type=in_range(RANGES["top_p"]),
        metavar="P",
        help="sample from the likeliest tokens of this total probability (default: the model's, or 1)",
    )
    add(
        "--min-p",
        type=in_range(RANGES["min_p"]),
        metavar="P",
        help="leave out tokens less likely than this share of the likeliest's probability (default: the "
        "model's, or 0)",
    )
    add(
        "--repetition-penalty",
        type=in_range(RANGES["repetition_penalty"]),
        metavar="R",
        help="0.01 to 100; above 1: avoid tokens of prompt and answer (default: the model's, or 1)",
    )
    for name in ("presence", "frequency"):
        each = "for every time it came" if name == "frequency" else "if it came at all"
        add(
            f"--{name}-penalty",
            type=in_range(RANGES[f"{name}_penalty"]),
            metavar="X",
            help=f"lower a token's logit by X {each} in the answer (default: 0)",
        )
    add(
        "--logit-bias",
        type=bias,
        action="append",
        metavar="TOKEN=BIAS",
        help="add to a token id's logit, -100 to 100; may be repeated",
    )
    add("--seed", type=seed, metavar="N", help="repeat a sampled answer (default: random)")
    add("--stop", action="append", metavar="TEXT", help="end the answer before TEXT; may be repeated")
    add(
        "--stop-token-id",
        type=not_negative,
        action="append",
        metavar="ID",
        help="end the answer at this token; may be repeated",
    )
    add(
        "--min-tokens",
        type=not_negative,
        metavar="N",
        help="least tokens to answer: nothing ends it before (default: 0)",
    )
    add(
        "--bad-word",
        action="append",
        metavar="TEXT",
        help="a text that the answer does not have; may be repeated",
    )
    add(
        "--allowed-token-id",
        type=not_negative,
        action="append",
        metavar="ID",
        help="draw only this token and others named so; may be repeated",
    )
    add(
        "--truncate-prompt-tokens",
        type=positive,
        metavar="N",
        help="use the last N tokens of the prompt (default: all)",
    )
    add("--ignore-eos", action="store_true", help="go on to --max-tokens, whatever the model says")


def asked(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for ``Client.generate``, all but the prompt's. Options that don't go together are a
    usage error: exit 2."""
    if args.n is not None and args.n > 1 and args.temperature == 0:
        args.usage_error(
            f"--n {args.n} would give {args.n} times the same answer: give a --temperature above 0"
        )
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(args, name) is not None and not args.json:
            args.usage_error(f"--{name.replace('_', '-')} are told in JSON only: add --json")
    options = {option.name: getattr(args, option.name, None) for option in fields(Sampling)}
    limit = {} if args.timeout is None else {"deadline_s": args.timeout}
    return (
        options
        | limit
        | {
            "model": args.model or "",
            "cache_salt": args.cache_salt,
            "logit_bias": dict(args.logit_bias or ()),
            "stop": args.stop or (),
            "stop_token_ids": args.stop_token_id or (),
            "bad_words": args.bad_word or (),
            "allowed_token_ids": args.allowed_token_id or (),
        }
    )


def add_structure_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("structure").add_mutually_exclusive_group()
    group.add_argument(
        "--json-schema", metavar="SCHEMA", help="answer with JSON of this schema; @FILE reads it from a file"
    )
    group.add_argument("--regex", metavar="REGEX", help="answer with a text that matches as a whole")
    group.add_argument(
        "--choice", action="append", metavar="TEXT", help="answer with one of these texts; may be repeated"
    )
    group.add_argument(
        "--grammar", metavar="LARK", help="answer by a grammar in Lark's syntax; @FILE reads it from a file"
    )


def structure(args: argparse.Namespace) -> dict[str, Any]:
    """The structure, as keyword arguments for ``Client.generate``. Raises InvalidRequest for a file that
    can't be read, or a schema that is no JSON object."""
    texts = {
        name: read_text(text) if text is not None and text.startswith("@") else text
        for name, text in (("json_schema", args.json_schema), ("grammar", args.grammar))
    }
    if (schema := texts["json_schema"]) is not None:
        try:
            known = isinstance(json.loads(schema), dict)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"--json-schema: the text is no JSON: {error}") from error
        if not known:
            raise InvalidRequest("--json-schema: give a JSON object")
    return texts | {"regex": args.regex, "choice": args.choice}
