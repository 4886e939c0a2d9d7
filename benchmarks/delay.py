"""A proxy that delays TCP connections and limits their rate, for kernels without netem.

``python -m farshore.benchmarks.delay`` listens on the same ports as its target, at another address, so that a
port of the target is valid at the proxy too. Bytes leave in order, each ``delay`` seconds after it came and
at most ``rate`` per second, as on a link without loss. The process ends when its standard input does.

On Linux all of 127.0.0.0/8 is this host: the benchmarks' proxy is 127.0.0.2 for a worker on 127.0.0.1.
"""

import argparse
import ctypes
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from farshore.errors import StartupError

CHUNK_BYTES = 256 << 10
CONNECT_DEADLINE_S = 5.0
QUEUED_CHUNKS = 4096
"""Chunks in flight in one direction. Beyond, the sender is blocked."""

_PR_SET_TIMERSLACK = 29


@contextmanager
def proxy(*, listen: str, target: str, ports: list[int], delay_s: float) -> Iterator[None]:
    """Runs the proxy in a process of its own while the block runs. The proxy listens when the block begins.
    Raises StartupError if it ends before that."""
    command = [sys.executable, "-P", "-m", "farshore.benchmarks.delay", "--listen", listen]
    command += ["--target", target, "--delay-s", str(delay_s), "--ports", *map(str, ports)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        try:
            if not process.stdout.readline():
                raise StartupError(f"the delaying proxy at {listen} ended with {process.wait()}")
            yield
        finally:
            process.kill()


class _Direction:
    """Moves bytes from one socket to the other. One thread waits for bytes, another for the time to send."""

    def __init__(self, source: socket.socket, to: socket.socket, delay_s: float, rate: float) -> None:
        self._source, self._to = source, to
        self._delay_s, self._rate = delay_s, rate
        self._queued: queue.Queue[tuple[float, bytes]] = queue.Queue(QUEUED_CHUNKS)
        for run in (self._receive, self._send):
            threading.Thread(target=run, daemon=True).start()

    def _receive(self) -> None:
        free_s = 0.0  # The time when the link has sent all earlier bytes.
        chunk = b"-"
        while chunk:
            try:
                chunk = self._source.recv(CHUNK_BYTES)
            except OSError:
                chunk = b""
            free_s = max(free_s, time.monotonic()) + len(chunk) / self._rate
            self._queued.put((free_s + self._delay_s, chunk))

    def _send(self) -> None:
        while True:
            due_s, chunk = self._queued.get()
            left_s = due_s - time.monotonic()
            if left_s > 0:
                time.sleep(left_s)
            try:
                if not chunk:
                    self._to.shutdown(socket.SHUT_WR)
                    return
                self._to.sendall(chunk)
            except OSError:
                with suppress(OSError):
                    self._source.shutdown(socket.SHUT_RD)
                return


def _accept(listener: socket.socket, target: tuple[str, int], delay_s: float, rate: float) -> None:
    while True:
        accepted, _ = listener.accept()
        try:
            connected = socket.create_connection(target, timeout=CONNECT_DEADLINE_S)
        except OSError:
            accepted.close()
            continue
        connected.settimeout(None)
        for end in (accepted, connected):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _Direction(accepted, connected, delay_s, rate)
        _Direction(connected, accepted, delay_s, rate)


def main() -> None:
    parser = argparse.ArgumentParser(description="Delay TCP connections.")
    parser.add_argument("--listen", required=True, metavar="HOST")
    parser.add_argument("--target", required=True, metavar="HOST")
    parser.add_argument("--ports", required=True, nargs="+", type=int, metavar="PORT")
    parser.add_argument("--delay-s", default=0.0, type=float, metavar="S", help="one way")
    parser.add_argument("--rate", default=float("inf"), type=float, metavar="BYTES/S", help="each way")
    args = parser.parse_args()
    # Without this, a sleep lasts up to 50 µs too long.
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1))
    for port in args.ports:
        listener = socket.create_server((args.listen, port))
        arguments = (listener, (args.target, port), args.delay_s, args.rate)
        threading.Thread(target=_accept, args=arguments, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
