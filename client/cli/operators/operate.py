"""``farshore scale``, ``drain``, ``gateway``, ``down`` and ``events``: for operators of a running cluster.

Called by ``main``. Must not know anything but the SDK, and what ends a cluster that has no gateway.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, TypeAlias

from farshore.client.cli.connect import CALL_DEADLINE_S, connected
from farshore.client.cli.options.gateway import add_gateway_options
from farshore.client.cli.options.values import number, whole
from farshore.client.cli.reading import reading
from farshore.client.cli.terminal import Progress, write
from farshore.client.events import ClusterEvent
from farshore.client.sdk import Client
from farshore.cluster_token import VARIABLE
from farshore.defaults import GATEWAY_ALLOCATOR
from farshore.errors import DeadlineExceeded, TransportError

KINDS = ("attention", "dense")
POLL_S = 0.5
_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_parser(commands: "_Commands") -> None:
    for add in (_add_scale, _add_drain, _add_down, _add_events):
        parser = add(commands)
        add_gateway_options(parser)
        a_line = " a line" if add is _add_events else ""
        parser.add_argument("--json", action="store_true", help=f"print one JSON object{a_line}")
        parser.set_defaults(usage_error=parser.error)
    gateway = commands.add_parser(
        "gateway",
        help="run one more gateway of a cluster",
        # All arguments, --help too, are the gateway's: none begins with this character.
        prefix_chars="\0",
        add_help=False,
    )
    gateway.add_argument("arguments", nargs="*")
    gateway.set_defaults(run=run_gateway)


def _add_scale(commands: "_Commands") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "scale",
        help="change how many workers run",
        description="Change how many workers of a kind run. New sequences use a new worker at once; a worker "
        "that is too much gets nothing new, and ends when nothing reads from it.",
        epilog="example: farshore scale attention=4",
    )
    parser.add_argument("counts", nargs="+", type=_count, metavar="KIND=N", help="attention=N or dense=N")
    parser.set_defaults(run=run_scale)
    return parser


def _add_drain(commands: "_Commands") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "drain",
        help="end a worker without failing requests",
        description="End a worker: it gets nothing new; an attention worker's KV moves to others while its "
        "sequences go on, a dense worker's requests end. Another worker takes its place. Waits until it has "
        "ended; Ctrl-C ends the waiting only.",
        epilog="example: farshore drain attention-1",
    )
    parser.add_argument("worker", metavar="WORKER", help="the id or the slot that `farshore status` shows")
    parser.add_argument(
        "--drain-timeout",
        type=number,
        metavar="S",
        help="what is left after this time fails and must be sent again (default: serve's --drain-timeout "
        "for a dense worker; none for an attention worker)",
    )
    parser.add_argument("--no-wait", action="store_true", help="only begin")
    parser.set_defaults(run=run_drain)
    return parser


def _add_down(commands: "_Commands") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "down",
        help="end a cluster",
        description="End all workers and the controller of a cluster, also of one whose `farshore serve` is "
        "gone.",
        epilog="example: farshore down --ray-address 10.0.0.1:6379 --token-file token",
    )
    parser.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="end a cluster on this Ray, whether or not a gateway runs",
    )
    parser.add_argument(
        "--name", default="default", help="with --ray-address, the cluster's name (default: %(default)s)"
    )
    parser.add_argument(
        "--token-file",
        default=os.environ.get(VARIABLE),
        metavar="FILE",
        help=f"with --ray-address, the cluster's token (default: ${VARIABLE}, else $RAY_AUTH_TOKEN_PATH)",
    )
    parser.set_defaults(run=run_down)
    return parser


def _add_events(commands: "_Commands") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "events",
        help="show what happened to the workers",
        description="Show what happened to the workers: started, joined, lost, replaced, killed, draining, "
        "drained, retired.",
        epilog="example: farshore events --follow --json",
    )
    parser.add_argument("--follow", action="store_true", help="wait for new events until Ctrl-C")
    parser.set_defaults(run=run_events)
    return parser


def run_scale(args: argparse.Namespace) -> int:
    with connected(args) as client:
        counts = client.scale(**dict(args.counts))
    _tell(args, counts, " ".join(f"{kind}={count}" for kind, count in counts.items()))
    return 0


def run_drain(args: argparse.Namespace) -> int:
    progress = Progress()
    with connected(args) as client:
        worker = client.drain(args.worker, timeout_s=args.drain_timeout)
        if args.no_wait:
            _tell(args, {"worker_id": worker, "ended": False}, "")
            return 0
        told = ""
        try:
            while (left := _left(client, worker)) is not None:
                if left != told:
                    progress.step(told := left)
                time.sleep(POLL_S)
        finally:
            progress.clear()
    _tell(args, {"worker_id": worker, "ended": True}, f"{worker} has ended")
    return 0


def _tell(args: argparse.Namespace, facts: dict[str, Any], text: str) -> None:
    """Prints what was done; ``text`` may be empty: nothing."""
    if args.json or text:
        write(f"{json.dumps(facts) if args.json else text}\n")


def _left(client: Client, worker: str) -> str | None:
    """What the drain of a worker waits for; None when the worker is gone."""
    try:
        status = client.status()
    except (TransportError, DeadlineExceeded) as error:
        return f"draining {worker}: {error}"
    if all(each.worker_id != worker for each in status.workers):
        return None
    needing = sum(
        sequence.owner == worker or any(span.worker_id == worker for span in sequence.spans)
        for sequence in status.sequences
    )
    return f"draining {worker}: {needing} sequence{'' if needing == 1 else 's'} left"


def run_gateway(args: argparse.Namespace) -> int:
    """Becomes ``python -m farshore.gateway``, which has the options."""
    if importlib.util.find_spec("tokenizers") is None:
        raise ModuleNotFoundError("the server is not installed", name="tokenizers")
    # -P keeps the current directory, which may be a checkout, off sys.path.
    command = [sys.executable, "-P", "-m", "farshore.gateway", *args.arguments]
    os.execve(sys.executable, command, GATEWAY_ALLOCATOR | os.environ)


def run_down(args: argparse.Namespace) -> int:
    if args.ray_address is not None:
        # Imported here: Ray takes most of a second to import, which other commands must not pay.
        from farshore.controller.driver.finding import end_cluster

        progress = Progress()
        try:
            end_cluster(args.ray_address, args.name, token_file=args.token_file, progress=progress.step)
        finally:
            progress.clear()
    else:
        with connected(args) as client:
            client.down()
    _tell(args, {"down": True}, "")
    return 0


def run_events(args: argparse.Namespace) -> int:
    with connected(args) as client:
        try:
            with reading(
                client,
                lambda own: own.watch_events(follow=args.follow),
                timeout_s=args.timeout or CALL_DEADLINE_S,
            ) as events:
                for event in events:
                    write(f"{json.dumps(dataclasses.asdict(event)) if args.json else _line(event)}\n")
        except KeyboardInterrupt:
            if not args.follow:
                raise
    return 0


def _count(text: str) -> tuple[str, int]:
    kind, equals, number = text.partition("=")
    if not equals or kind not in KINDS:
        raise argparse.ArgumentTypeError(f"{text!r}: use attention=N or dense=N, such as attention=4")
    count = whole(number)
    if count < 0:
        raise argparse.ArgumentTypeError(f"{text}: use 0 or more")
    return kind, count


def _line(event: ClusterEvent) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.unix_s))
    fields: Sequence[str] = (when, f"{event.kind:8}", event.subject, event.detail)
    return "  ".join(field for field in fields if field)
