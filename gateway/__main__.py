"""The gateway as a process: ``farshore gateway``, or ``python -m farshore.gateway``.

Platform engineers start it beside a cluster; any number of gateways serve one cluster. With ``--child`` it is
started by ``controller.driver.gateway_process``, which reads one line of JSON from stdout (the address, or
the error) and keeps the write end of stdin open: when stdin closes, the parent has ended, and the gateway
ends too. Must not know how the engines and the controller are run.
"""

import argparse
import asyncio
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from farshore import __version__
from farshore.cluster_token import VARIABLE, ClusterToken
from farshore.errors import FarshoreError, InvalidRequest, StartupError
from farshore.gateway.api.server import Gateway, create
from farshore.gateway.limits import Limits
from farshore.gateway.served import Served
from farshore.interpreter import share_interpreter
from farshore.kvstore.directory.base import Directory
from farshore.kvstore.directory.connect import check_token, open_directory
from farshore.model_spec import ModelSpec

LOOK_S = 0.2
"""How often the directory is asked for a dense worker while there is none."""


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal; a child also until the end of stdin. Returns the exit code: 0, 1 after an error,
    130 when it was interrupted while starting."""
    args = _parser().parse_args(argv)
    _allow_open_files()
    stop = _Stop()
    if args.child:
        _watch_parent(stop.set)
    try:
        token = ClusterToken.read(args.token_file) if args.token_file else None
        directory = open_directory(args.directory, token=token)
        check_token(directory)
        controller = args.controller or _controller_at(args.directory)
        spec = args.spec or _announced_spec(directory, args.wait)
        served = Served.load(ModelSpec.from_json(spec))
        share_interpreter()
        served.chat.await_compiled()
        asyncio.run(_serve(served, directory, controller, token, stop, args))
    except FarshoreError as error:
        if args.child:
            _report({"error": str(error), "kind": type(error).__name__})
        else:
            print(f"farshore: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        # Possible only before the signal handlers are installed.
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="farshore gateway",
        description="Serve the client API of a running cluster until SIGTERM or Ctrl-C. Any number of "
        "gateways may serve one cluster: give clients all their addresses.",
        epilog="example: farshore gateway --directory grpc://10.0.0.1:6400 --listen 0.0.0.0:50051",
    )
    parser.add_argument(
        "--directory",
        required=True,
        metavar="URL",
        help="where the cluster's workers are listed: grpc://HOST:PORT of the controller, or redis://HOST:PORT",
    )
    parser.add_argument(
        "--controller",
        metavar="HOST:PORT",
        help="passes operators' calls on to it: status, scale, events (default: where grpc:// points)",
    )
    parser.add_argument(
        "--listen",
        default="127.0.0.1:50051",
        metavar="HOST:PORT",
        help="address to listen on; port 0: any free one (default: %(default)s)",
    )
    parser.add_argument(
        "--spec",
        metavar="JSON",
        help='the model that the engines run and how to read it, such as {"model": "smollm2"} (default: what '
        "a dense worker announces)",
    )
    parser.add_argument(
        "--http",
        metavar="HOST:PORT",
        help="listen for the OpenAI-compatible HTTP API here, too; port 0: any free one (default: off)",
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=600.0,
        metavar="S",
        help="without --spec: how long to wait for a dense worker that announces it (default: %(default)g)",
    )
    parser.add_argument(
        "--drain-timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="how long running requests go on after SIGTERM (default: %(default)g)",
    )
    parser.add_argument("--max-live-requests", type=int, default=Limits().max_live_requests, metavar="N")
    parser.add_argument(
        "--child",
        action="store_true",
        help="for a parent process: report in JSON once an engine takes requests, and end when stdin does",
    )
    parser.add_argument(
        "--token-file",
        default=os.environ.get(VARIABLE),
        metavar="FILE",
        help=f"the cluster's token, proved to engines, directory and controller (default: ${VARIABLE})",
    )
    return parser


class _Stop:
    """Ends the event loop's wait, also if it is set before the event loop runs. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._set = False
        self._tell: Callable[[], None] | None = None

    def set(self) -> None:
        with self._lock:
            self._set = True
            if self._tell is not None:
                self._tell()

    def follow(self, tell: Callable[[], None] | None) -> None:
        """``tell`` is called when this is set, at once if it has been; None: nothing more is called."""
        with self._lock:
            self._tell = tell
            if tell is not None and self._set:
                tell()


def _allow_open_files() -> None:
    """Raises the limit of open files as far as this process may: each client takes one, and many systems and
    container runtimes begin with 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _serve(
    served: Served,
    directory: Directory,
    controller: str,
    token: ClusterToken | None,
    stop: _Stop,
    args: argparse.Namespace,
) -> None:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    stop.follow(lambda: loop.call_soon_threadsafe(stopping.set))
    gateway = await create(
        served,
        listen=args.listen,
        http=args.http,
        directory=directory,
        controller=controller,
        token=token,
        announced_spec=None if args.spec else served.spec.to_json(),
        limits=Limits(max_live_requests=args.max_live_requests, drain_s=args.drain_timeout),
    )
    reporting = asyncio.create_task(_report_serving(gateway, served, child=args.child))
    failing = asyncio.create_task(gateway.await_failure())
    failing.add_done_callback(lambda _: stopping.set())
    try:
        await stopping.wait()
        if failing.done():
            failing.result()
    finally:
        stop.follow(None)
        reporting.cancel()
        failing.cancel()
        await gateway.stop()
        directory.disconnect()


async def _report_serving(gateway: Gateway, served: Served, *, child: bool) -> None:
    """Says where the gateway listens: to a parent once requests can be answered."""
    if not child:
        http = f", HTTP at {gateway.http_address}" if gateway.http_address else ""
        print(f"Farshore {__version__}: gateway of {served.spec.name} at {gateway.address}{http}", flush=True)
    await gateway.await_serving()
    if child:
        _report({"address": gateway.address, "http": gateway.http_address})
    else:
        print("an engine takes requests", flush=True)


def _controller_at(directory: str) -> str:
    """HOST:PORT of the controller that serves the directory. Raises InvalidRequest for another directory."""
    parts = urlsplit(directory)
    if parts.scheme != "grpc":
        raise InvalidRequest(
            f"--controller is missing: --directory {parts.scheme}:// is no controller; give its HOST:PORT"
        )
    return parts.netloc


def _announced_spec(directory: Directory, wait_s: float) -> str:
    """The model's options, from the first dense worker that is listed. Raises StartupError after ``wait_s``
    seconds without one."""
    until_s = time.monotonic() + wait_s
    why = "it lists no dense worker"
    while True:
        try:
            for record in directory.listing().workers:
                if record.kind == "dense" and record.spec:
                    return record.spec
        except FarshoreError as error:
            why = str(error)
        if time.monotonic() > until_s:
            raise StartupError(
                f"the directory does not say which model to serve ({why}): check --directory, or give --spec"
            )
        time.sleep(LOOK_S)


def _watch_parent(gone: Callable[[], None]) -> None:
    """Calls ``gone`` from a thread when stdin ends. asyncio's pipe transport is not used because stdin may be
    a terminal or a file."""

    def wait_for_end() -> None:
        try:
            while os.read(0, 4096):
                pass
        except OSError:
            pass  # A process without stdin.
        gone()

    threading.Thread(target=wait_for_end, name="watch-parent", daemon=True).start()


def _report(message: dict[str, str]) -> None:
    try:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # The parent has ended; stdin ends too. Python's flush of stdout at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    sys.exit(main())
