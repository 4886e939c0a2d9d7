"""The ``farshore`` command: runs a subcommand and turns errors into one line and an exit code.

The console script's entry point. Must not know what the subcommands do.
"""

import argparse
import contextlib
import difflib
import io
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from farshore import __version__
from farshore.client.cli import bench as cli_bench
from farshore.client.cli import doctor as cli_doctor
from farshore.client.cli import generate as cli_generate
from farshore.client.cli import models as cli_models
from farshore.client.cli import node as cli_node
from farshore.client.cli import serve as cli_serve
from farshore.client.cli.chat import command as cli_chat
from farshore.client.cli.operators import operate as cli_operate
from farshore.client.cli.operators import status as cli_status
from farshore.client.cli.operators import top as cli_top
from farshore.client.cli.terminal import printable
from farshore.errors import DeadlineExceeded, FarshoreError, Unauthenticated

FAILED, WRONG_USAGE, UNAVAILABLE, INTERRUPTED = 1, 2, 3, 130

_COMMANDS = (
    cli_serve,
    cli_node,
    cli_generate,
    cli_chat,
    cli_models,
    cli_status,
    cli_top,
    cli_operate,
    cli_bench,
    cli_doctor,
)

_HELP = """\
examples:
  farshore generate 'Why is the sky blue?'   starts a cluster for this call if none runs
  farshore serve --model smollm2             keeps one running
  farshore COMMAND --help                    explains a command, with an example

exit codes:
  0    done
  1    failed
  2    wrong usage
  3    nothing answers, or not in time, or the cluster is busy: the same command may succeed later
  130  ended by Ctrl-C or SIGTERM before it was done
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code, see ``farshore --help``."""
    _prepare_streams()
    try:
        args = parser().parse_args(argv)
        return args.run(args)
    except SystemExit as leaving:  # argparse: --help, --version, wrong usage
        return leaving.code if isinstance(leaving.code, int) else FAILED
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "farshore":
            raise
        return _failed(
            f"this command needs {error.name}, which is part of the server: install it with "
            'pip install ".[server]" in a checkout of farshore, or name a running gateway with --server'
        )
    except FarshoreError as error:
        hint = "; --timeout S gives it more time" if isinstance(error, DeadlineExceeded) else ""
        return _failed(f"{error}{hint}", UNAVAILABLE if _may_pass(error) else FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout has closed it, as `| head` does. Python's flush at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _may_pass(error: FarshoreError) -> bool:
    """Whether the same command may succeed later."""
    return isinstance(error, DeadlineExceeded) or (error.retryable and not isinstance(error, Unauthenticated))


def _failed(message: str, code: int = FAILED) -> int:
    print(f"farshore: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def _prepare_streams() -> None:
    """No output fails for a character that the locale lacks, nor because a stream is closed; what is piped
    in is UTF-8, as files are."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        # Not possible once something was read, as it may have been where `main` is called as a function.
        with contextlib.suppress(io.UnsupportedOperation):
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")


def parser() -> argparse.ArgumentParser:
    """The parser of all commands. What it returns has ``run``, which takes the arguments."""
    made = _Parser(
        prog="farshore",
        description="Long-context LLM serving: attention runs where the KV memory is.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"farshore {__version__}")
    commands = made.add_subparsers(metavar="COMMAND", required=True, parser_class=argparse.ArgumentParser)
    for command in _COMMANDS:
        command.add_parser(commands)
    return made


class _Parser(argparse.ArgumentParser):
    """It names the nearest command, where argparse names all."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action.choices, Mapping) and value not in action.choices:
            self.error(_unknown(value, action.choices))
        super()._check_value(action, value)


def _unknown(word: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(word, names, n=1)
    meant = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names)}"
    return f"unknown command {word!r}: {meant}"


if __name__ == "__main__":
    sys.exit(main())
