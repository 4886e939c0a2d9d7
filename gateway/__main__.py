"""The gateway as a process: ``python -m farshore.gateway``.

Started by ``controller.driver.gateway_process``, which reads one line of JSON from stdout (the address, or
the error) and keeps the write end of stdin open. When stdin closes, the parent has ended, and the gateway
ends too. A stdin that is closed before the gateway serves is an error, also when the process is started by
hand. Must not know how the engine and the controller are run.
"""

import argparse
import asyncio
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Sequence

from farshore.errors import FarshoreError, StartupError
from farshore.gateway.api.server import create
from farshore.gateway.limits import Limits
from farshore.gateway.served import Served
from farshore.interpreter import share_interpreter
from farshore.model_spec import ModelSpec

_STDIN_ADVICE = (
    "the gateway runs as long as its stdin is open: keep it open, as in "
    "`sleep infinity | python -m farshore.gateway …`"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal or the end of stdin. Returns the exit code: 0, 1 after an error, 130 when it was
    interrupted while starting."""
    args = _parser().parse_args(argv)
    try:
        served = Served.load(ModelSpec.from_json(args.spec))
        share_interpreter()
        served.chat.await_compiled()
        engine = args.engine or sys.stdin.readline().strip()
        if not engine:
            raise StartupError(f"stdin ended before it gave the engine's address; {_STDIN_ADVICE}")
        asyncio.run(_serve(served, engine, args))
    except FarshoreError as error:
        _report({"error": str(error), "kind": type(error).__name__})
        return 1
    except KeyboardInterrupt:
        # Possible only before the signal handlers are installed.
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m farshore.gateway",
        description="Serve the client API of a running cluster. Prints one line of JSON when ready; "
        "ends when its stdin does, so keep that open.",
    )
    parser.add_argument(
        "--spec",
        required=True,
        metavar="JSON",
        help='the model that the engine runs and how to read it, such as {"model": "smollm2"}',
    )
    parser.add_argument("--listen", required=True, metavar="HOST:PORT", help="port 0: any free one")
    parser.add_argument(
        "--http", metavar="HOST:PORT", help="listen for the OpenAI-compatible HTTP API too; port 0: any free"
    )
    parser.add_argument(
        "--engine",
        metavar="HOST:PORT",
        help="address of the dense worker (default: the first line of stdin, read when all else is ready)",
    )
    parser.add_argument("--controller", required=True, metavar="HOST:PORT", help="asked for status only")
    parser.add_argument("--max-live-requests", type=int, default=Limits().max_live_requests)
    return parser


async def _serve(served: Served, engine: str, args: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    gateway = await create(
        served,
        listen=args.listen,
        http=args.http,
        engine=engine,
        controller=args.controller,
        limits=Limits(max_live_requests=args.max_live_requests),
    )
    try:
        if _stdin_ended():
            raise StartupError(f"stdin is closed; {_STDIN_ADVICE}")
        _watch_parent(lambda: loop.call_soon_threadsafe(stop.set))
        _report({"address": gateway.address, "http": gateway.http_address})
        await stop.wait()
    finally:
        await gateway.stop()


def _stdin_ended() -> bool:
    """Whether stdin has reached its end. Does not block; discards unexpected input."""
    try:
        while select.select([0], [], [], 0)[0]:
            if not os.read(0, 4096):
                return True
    except OSError:
        return True  # A process without stdin.
    return False


def _watch_parent(gone: Callable[[], None]) -> None:
    """Calls ``gone`` from a thread when stdin ends. asyncio's pipe transport is not used because stdin may be
    a terminal or a file."""

    def wait_for_end() -> None:
        try:
            while os.read(0, 4096):
                pass
        except OSError:
            pass  # A process without stdin.
        try:
            gone()
        except RuntimeError:
            return  # The event loop has closed: the process is ending already.

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
