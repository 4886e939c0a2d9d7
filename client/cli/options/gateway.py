"""The options that say which gateway a command uses.

Used by the subcommands' modules and by ``cluster``. Must not know what the commands do.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from farshore.client.cli.options.values import DEFAULT_SERVER, seconds, server_addresses
from farshore.errors import TransportError


class _Servers(argparse.Action):
    """Collects the addresses of an option that may be repeated."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        earlier = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if earlier is self.default else [*earlier, *values])


def add_gateway_options(
    parser: argparse.ArgumentParser,
    *,
    default: Sequence[str] | None = (DEFAULT_SERVER,),
    help: str = f"the gateway, or several of a cluster: with commas, or repeated (default: {DEFAULT_SERVER})",
    timeout_help: str = "most time that a gateway may take for each call (default: 10), and to answer at all "
    "(default: 30)",
) -> None:
    """Adds ``--server`` and ``--timeout`` for a command that uses a running gateway. ``server`` becomes a
    sequence of addresses, ``timeout`` a number of seconds or None."""
    parser.add_argument(
        "--server",
        type=server_addresses,
        action=_Servers,
        default=default,
        metavar="HOST:PORT",
        help=help,
    )
    parser.add_argument("--timeout", type=seconds, metavar="S", help=timeout_help)


def no_gateway(addresses: Sequence[str]) -> TransportError:
    """The error of a command that needs a running gateway."""
    return TransportError(
        f"no gateway answers at {' or '.join(addresses)}: start one with `farshore serve`, or give the right "
        "--server"
    )
