"""``farshore scale``, ``farshore down`` and ``farshore events``: an operator's commands on a running cluster.

Called by ``main``. Must not know anything but the SDK.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence

from farshore.client.cli.connect import await_gateway
from farshore.client.cli.options import add_server_option, no_gateway, whole
from farshore.client.cli.terminal import Progress
from farshore.client.events import ClusterEvent
from farshore.client.sdk import Client

KINDS = ("attention", "dense")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    scale = commands.add_parser(
        "scale",
        help="change how many workers run",
        description="Change how many workers of a kind run. New sequences use a new worker at once; a worker "
        "that is too much gets nothing new, and ends when nothing reads from it.",
        epilog="example: farshore scale attention=4",
    )
    scale.add_argument("counts", nargs="+", type=_count, metavar="KIND=N", help="attention=N or dense=N")
    scale.set_defaults(run=run_scale)
    down = commands.add_parser(
        "down",
        help="end a cluster",
        description="End all workers and the controller of a cluster, also of one whose `farshore serve` is "
        "gone.",
    )
    down.set_defaults(run=run_down)
    events = commands.add_parser(
        "events",
        help="show what happened to the workers",
        description="Show what happened to the workers: started, joined, lost, replaced, killed, retired.",
    )
    events.add_argument("--follow", action="store_true", help="wait for new events until Ctrl-C")
    events.add_argument("--json", action="store_true", help="print one JSON object a line")
    events.set_defaults(run=run_events)
    for parser in (scale, down, events):
        add_server_option(parser)
        parser.set_defaults(usage_error=parser.error)


def run_scale(args: argparse.Namespace) -> int:
    with _connected(args) as client:
        counts = client.scale(**dict(args.counts))
    print(" ".join(f"{kind}={count}" for kind, count in counts.items()))
    return 0


def run_down(args: argparse.Namespace) -> int:
    with _connected(args) as client:
        client.down()
    return 0


def run_events(args: argparse.Namespace) -> int:
    with _connected(args) as client:
        for event in client.watch_events(follow=args.follow):
            print(json.dumps(dataclasses.asdict(event)) if args.json else _line(event), flush=True)
    return 0


def _connected(args: argparse.Namespace) -> Client:
    progress = Progress()
    client = Client(args.server)
    try:
        if not await_gateway(client, progress.step, to_serve=False):
            raise no_gateway(args.server)
    except BaseException:
        client.close()
        raise
    finally:
        progress.clear()
    return client


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
