"""``farshore gateway``: runs one more gateway of a running cluster, in the foreground.

Called by ``main``. It becomes ``python -m farshore.gateway``, which has the options. Must not know what a
gateway does.
"""

import argparse
import importlib.util
import os
import sys

from farshore.defaults import GATEWAY_ALLOCATOR


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "gateway",
        help="run one more gateway of a running cluster",
        # All arguments, --help too, are the gateway's: none begins with this character.
        prefix_chars="\0",
        add_help=False,
    )
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("tokenizers") is None:
        raise ModuleNotFoundError("the server is not installed", name="tokenizers")
    # -P keeps the current directory, which may be a checkout, off sys.path.
    command = [sys.executable, "-P", "-m", "farshore.gateway", *args.arguments]
    os.execve(sys.executable, command, GATEWAY_ALLOCATOR | os.environ)
