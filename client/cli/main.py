"""The ``farshore`` command: runs a subcommand and turns errors into one line and an exit code.

The console script's entry point. Must not know what the subcommands do.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from farshore import __version__
from farshore.client.cli import bench as cli_bench
from farshore.client.cli import generate as cli_generate
from farshore.client.cli import node as cli_node
from farshore.client.cli import operate as cli_operate
from farshore.client.cli import serve as cli_serve
from farshore.client.cli import status as cli_status
from farshore.errors import FarshoreError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        args = _parser().parse_args(argv)
        return args.run(args)
    except SystemExit as leaving:  # argparse: --help, --version, wrong usage
        return leaving.code if isinstance(leaving.code, int) else 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "farshore":
            raise
        print(
            f"farshore: error: this command needs {error.name}, which is part of the server: install it with "
            "pip install 'farshore[server]', or name a running gateway with --server",
            file=sys.stderr,
        )
        return 1
    except FarshoreError as error:
        print(f"farshore: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of stdout has closed it, as `| head` does. Python's flush at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="farshore",
        description="Long-context LLM serving: attention runs where the KV memory is.",
        epilog="`farshore COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"farshore {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (cli_serve, cli_node, cli_generate, cli_status, cli_operate, cli_bench):
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
