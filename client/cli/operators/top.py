"""``farshore top``: what a running cluster does, again and again: a screen, lines of text, or JSON.

Called by ``main``. Must not know anything but the SDK.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterable

from farshore.client.cli.connect import connected
from farshore.client.cli.operators.screen import Screen
from farshore.client.cli.operators.view import Line, Sample, Snapshot, render, snapshot
from farshore.client.cli.options.gateway import add_gateway_options
from farshore.client.cli.options.values import positive, seconds
from farshore.client.cli.terminal import stop_signals, takes_escapes, write
from farshore.client.sdk import Client
from farshore.errors import DeadlineExceeded, TransportError

INTERVAL_S = 2.0


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "top",
        help="watch workers, memory, sequences and tokens per second",
        description="Watch a cluster: its workers, the KV pool, running, waiting and parked sequences, "
        "tokens per second, and how fast each attention worker answers. On a terminal the view is drawn "
        "again in place until q or Ctrl-C; elsewhere each snapshot is printed.",
        epilog="example: farshore top --interval 10 --count 6 --json",
    )
    add_gateway_options(parser)
    parser.add_argument(
        "--interval",
        type=seconds,
        default=INTERVAL_S,
        metavar="S",
        help="time from one snapshot to the next (default: %(default)g)",
    )
    parser.add_argument("--count", type=positive, metavar="N", help="end after N snapshots (default: never)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line for each snapshot")
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    with stop_signals(), connected(args) as client:
        watch = _Watch(client)
        try:
            if takes_escapes(sys.stdout) and not args.json:
                _draw(watch, args)
            else:
                _print(watch, args)
        except KeyboardInterrupt:
            pass  # It is how this command ends.
    return 0


class _Watch:
    """Makes snapshots of what ``client`` reports."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._before: Sample | None = None

    def next(self) -> Snapshot:
        """Raises the errors of ``Client.status``."""
        sample = Sample(self._client.status(), time.monotonic())
        made = snapshot(sample, self._before, unix_s=time.time())
        self._before = sample
        return made


def _print(watch: _Watch, args: argparse.Namespace) -> None:
    """Raises the errors of ``Client.status``: what reads the output must not take silence for an answer."""
    for number in _numbers(args):
        if number:
            time.sleep(args.interval)
        now = watch.next()
        if args.json:
            write(f"{json.dumps(dataclasses.asdict(now))}\n")
        else:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now.unix_s))
            write("\n".join([when, *(line.text for line in render(now)), "", ""]))


def _draw(watch: _Watch, args: argparse.Namespace) -> None:
    """A status that does not come leaves the last one on the screen, with the reason."""
    shown: list[Line] = []
    with Screen() as screen:
        for _ in _numbers(args):
            try:
                shown = render(watch.next())
                lines = shown
            except (TransportError, DeadlineExceeded) as error:
                lines = [Line(f"no answer: {' '.join(str(error).split())}", "red"), Line(""), *shown]
            lines = [*lines, Line(""), Line(f"every {args.interval:g} s; q ends", "dim")]
            screen.draw(lines)
            until_s = time.monotonic() + args.interval
            while (event := screen.wait(until_s - time.monotonic())) == "redraw":
                screen.draw(lines)
            if event == "quit":
                return


def _numbers(args: argparse.Namespace) -> Iterable[int]:
    return itertools.count() if args.count is None else range(args.count)
