"""``farshore node``: runs a node of Ray as Farshore needs it, in the foreground; ``leave`` empties one.

Called by ``main``. ``node`` only composes a ``ray start``, and becomes that. Must not know what runs on the
node.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

from farshore.client.cli.options.values import number, server_address, size_bytes, whole
from farshore.client.cli.terminal import Progress
from farshore.cluster_token import VARIABLE, ClusterToken, making
from farshore.controller.launch.ray_settings import ENVIRONMENT, MARK, OBJECT_STORE_BYTES, QUICK_VERDICT
from farshore.errors import InvalidRequest

_DEFAULT_PORT = 6379


class RayStart(NamedTuple):
    """A command, and what it adds to the environment."""

    command: list[str]
    environment: dict[str, str]


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "node",
        help="run this host as a node of a cluster",
        description="Run this host as a node of Ray until Ctrl-C or SIGTERM, with the settings that Farshore "
        "needs. Start one node with --head, then the others; then `farshore serve --ray-address` on any.",
        epilog="example: farshore node --ray-address 10.0.0.1:6379 --attention 4 --token-file token",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--head", action="store_true", help="start a new Ray, whose first node this is")
    where.add_argument("--ray-address", type=server_address, metavar="HOST:PORT", help="join this Ray")
    parser.add_argument(
        "--dense", type=whole, default=0, metavar="N", help="dense workers that run here at most (default: 0)"
    )
    parser.add_argument(
        "--attention",
        type=whole,
        default=0,
        metavar="N",
        help="attention workers that run here at most (default: 0)",
    )
    parser.add_argument(
        "--memory",
        type=size_bytes,
        metavar="SIZE",
        help="memory for workers; each takes its --kv-memory and 320 MiB, a dense worker also its weights "
        "(default: what is free now)",
    )
    parser.add_argument("--cores", type=whole, metavar="N", help="cores for workers (default: all)")
    parser.add_argument(
        "--host", metavar="IP", help="this host's address for other nodes (default: of its default route)"
    )
    parser.add_argument(
        "--port",
        type=whole,
        default=_DEFAULT_PORT,
        metavar="N",
        help="with --head: the port of Ray (default: %(default)s)",
    )
    parser.add_argument("--dashboard", action="store_true", help="with --head: start Ray's dashboard, too")
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        default=os.environ.get(VARIABLE),
        help="the cluster's token, the same on every node (default: $FARSHORE_TOKEN_FILE)",
    )
    parser.add_argument("ray_options", nargs="*", metavar="-- RAY_OPTION", help="more options of `ray start`")
    parser.set_defaults(run=run)
    _add_leave(commands)


def _add_leave(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "leave",
        help="end a node's workers without failing requests, before the node is ended",
        description="Before a node is ended: Ray starts nothing more there, attention workers move their KV "
        "to other nodes, requests of dense workers end, and workers on other nodes take their place. Returns "
        "when the node has no workers.",
        epilog="example: farshore leave --timeout 300",
    )
    parser.add_argument(
        "--ray-address",
        type=server_address,
        metavar="HOST:PORT",
        default=os.environ.get("RAY_ADDRESS"),
        help="the Ray (default: $RAY_ADDRESS)",
    )
    parser.add_argument("--host", metavar="IP", help="the node's address (default: this host's)")
    parser.add_argument(
        "--timeout",
        type=number,
        default=300.0,
        metavar="S",
        help="what is left after this time fails and must be sent again (default: %(default)g)",
    )
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        default=os.environ.get(VARIABLE),
        help=f"the cluster's token (default: ${VARIABLE}, else $RAY_AUTH_TOKEN_PATH)",
    )
    parser.set_defaults(run=run_leave)


def run_leave(args: argparse.Namespace) -> int:
    if args.ray_address is None:
        raise InvalidRequest("give --ray-address HOST:PORT, or set RAY_ADDRESS")
    # Imported here: Ray takes most of a second to import, which other commands must not pay.
    from farshore.controller.driver.leaving import leave

    progress = Progress()
    try:
        leave(
            args.ray_address,
            host=args.host,
            token_file=args.token_file,
            timeout_s=args.timeout,
            progress=progress.step,
        )
    finally:
        progress.clear()
    return 0


def run(args: argparse.Namespace) -> int:
    start = ray_start(args)
    # Ray puts the current directory first on its workers' sys.path, where a checkout would hide the package.
    os.chdir(Path(sys.executable).parent)
    os.execve(sys.executable, [sys.executable, "-P", *start.command], os.environ | start.environment)


def ray_start(args: argparse.Namespace) -> RayStart:
    """The command for Python, and its environment. Raises InvalidRequest."""
    takes = {MARK: 1, "dense": args.dense, "attention": args.attention}
    command = ["-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
    command += [f"--resources={json.dumps({name: count for name, count in takes.items() if count})}"]
    if args.head:
        command += ["--head", f"--port={args.port}", f"--include-dashboard={str(args.dashboard).lower()}"]
    else:
        command += [f"--address={args.ray_address}"]
    given = {"memory": args.memory, "num-cpus": args.cores, "node-ip-address": args.host}
    command += [f"--{name}={value}" for name, value in given.items() if value is not None]
    environment = ENVIRONMENT | (QUICK_VERDICT if args.head else {})
    return RayStart([*command, *args.ray_options], environment | _authentication(args.token_file))


def _authentication(token_file: Path | str | None) -> dict[str, str]:
    """Raises InvalidRequest without a token: a client of a Ray without one can run any code on it."""
    if token_file is None:
        raise InvalidRequest(f"give --token-file FILE, the same on every node; {making('FILE')}")
    path = Path(token_file).absolute()
    ClusterToken.read(path)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path), VARIABLE: str(path)}
