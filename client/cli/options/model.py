"""The options that say what a cluster loads, and how.

Used by ``cluster`` for ``serve``, and for ``generate`` when it starts a cluster. Must not know what a model
is: ``ModelSpec`` checks the values.
"""

import argparse
import json
import re
from typing import Any, get_args

from farshore.model_spec import AUTO, ModelSpec, ReasoningParser, SpecialTokens, ToolCallParser
from farshore.text import quoted

_TOKENS = re.compile(r"(\d+(?:\.\d+)?)([kKmMgG]?)")
_TOKEN_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_DTYPES = {"auto": "bfloat16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}


def tokens(text: str) -> int:
    """Parses a number of tokens as vLLM does: 8192, 32K (binary), 32k or 25.6k (decimal)."""
    match = _TOKENS.fullmatch(text.strip())
    if match is None or ("." in match[1] and not match[2].islower()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of tokens: use a whole number, or K (1024) or k (1000), as in 32K"
        )
    number, unit = match.groups()
    return int(float(number) * _TOKEN_UNITS[unit]) if "." in number else int(number) * _TOKEN_UNITS[unit]


def json_object(text: str) -> dict[str, Any]:
    """Parses a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(
            f"{quoted(text)} is not JSON ({error}): write it in single quotes, such as "
            """'{"rope_type": "yarn", "factor": 4.0}'"""
        ) from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no JSON object: write it in braces")
    return value


def dtype(text: str) -> str:
    """The name of an element type as ``ClusterConfig`` takes it, from what users of other servers write."""
    return _DTYPES.get(text, text)


def add_model_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options of :class:`ModelSpec` except ``--model`` and ``--served-model-name``, and
    ``--dtype``."""
    add = group.add_argument
    add(
        "--dtype",
        type=dtype,
        default="auto",
        metavar="{auto,bfloat16,float32}",
        help="type of weights and KV; auto is bfloat16, float32 matches Transformers token for token "
        "(default: %(default)s)",
    )
    add(
        "--max-model-len",
        type=tokens,
        metavar="TOKENS",
        help="most tokens of a prompt and its answer together, such as 8192, 32K (32 x 1024) or 32k (32,000);"
        " more than the model's own needs --rope-scaling (default: what the model's files say)",
    )
    add(
        "--rope-scaling",
        type=json_object,
        metavar="JSON",
        help="scale the rotary position embedding to reach further than the model was trained for, in the "
        "form of config.json: "
        """'{"rope_type": "yarn", "factor": 4.0}' (default: what the model's files say)""",
    )
    add(
        "--revision",
        metavar="NAME",
        help="branch, tag or commit of a model on the Hugging Face hub (default: main)",
    )
    add(
        "--tokenizer",
        metavar="PATH_OR_ID",
        help="take the tokenizer from this folder, file or Hugging Face id (default: the model's own)",
    )
    add(
        "--chat-template",
        metavar="FILE",
        help="a Jinja file that makes the prompt of a chat, instead of the model's own template",
    )
    add(
        "--generation-config",
        default=AUTO,
        metavar="{auto,none,PATH}",
        help="the sampling of requests that leave it open: auto, as the model's generation_config.json or "
        "GGUF file says; none, our own defaults; or as this file or folder says (default: %(default)s)",
    )
    add(
        "--special-tokens-in-chat",
        choices=get_args(SpecialTokens),
        default="text",
        help="how a special token such as <|im_end|> in a chat message is read: as text, so that a message "
        "can't end its turn or forge another, or parse, as the token itself (default: %(default)s)",
    )
    add(
        "--tool-call-parser",
        choices=get_args(ToolCallParser),
        default="auto",
        help="the format of the tool calls that the model writes; auto tells it by the chat template "
        "(default: %(default)s)",
    )
    add(
        "--reasoning-parser",
        choices=get_args(ReasoningParser),
        default="auto",
        help="think: what an answer has between <think> and </think> is its reasoning; auto: if the chat "
        "template writes these marks (default: %(default)s)",
    )


def model_spec(args: argparse.Namespace, model: str) -> ModelSpec:
    """The request that the options make. Raises InvalidRequest."""
    return ModelSpec(
        model=model,
        revision=args.revision,
        tokenizer=args.tokenizer,
        chat_template=args.chat_template,
        generation_config=args.generation_config,
        max_model_len=args.max_model_len,
        rope_scaling=args.rope_scaling,
        served_names=tuple(getattr(args, "served_model_name", None) or ()),
        special_tokens_in_chat=args.special_tokens_in_chat,
        tool_call_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser,
    )
