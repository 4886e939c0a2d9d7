"""A controller with statuses that the test gives, and a browser."""

import os
import shutil
import struct
import subprocess
import zlib

import grpc
import pytest

from farshore import rpc
from farshore.proto import admin_pb2 as admin
from farshore.proto import admin_pb2_grpc


class Controller(admin_pb2_grpc.AdminServiceServicer):
    """Gives ``statuses`` one after the other, the last one again and again. An error's code and text stands
    for a status that does not come."""

    def __init__(self):
        self.statuses = [admin.ClusterStatusResponse(model="smollm2")]
        self.events = []
        self.asked = 0

    def ClusterStatus(self, request, context):
        answer = self.statuses[min(self.asked, len(self.statuses) - 1)]
        self.asked += 1
        if isinstance(answer, tuple):
            context.abort(*answer)
        return answer

    def WatchEvents(self, request, context):
        yield from (event for event in self.events if event.number > request.since)


@pytest.fixture
def controller():
    """A Controller at its ``address``."""
    made = Controller()
    server, made.address = rpc.serve(
        lambda server: admin_pb2_grpc.add_AdminServiceServicer_to_server(made, server),
        service=admin.DESCRIPTOR.services_by_name["AdminService"].full_name,
        listen="127.0.0.1:0",
        threads=4,
        token=None,
    )
    yield made
    server.stop(0).wait()


class TickingClock:
    """Goes on by a second whenever it is read, so that no status is fresh at the next poll."""

    def __init__(self):
        self._now_s = 0.0

    def __call__(self):
        self._now_s += 1.0
        return self._now_s


@pytest.fixture
def url(start, controller):
    """The page's address, at a gateway of ``controller``."""
    made = start(http="127.0.0.1:0", controller=controller.address, clock=TickingClock())
    return f"http://{made.gateway.http_address}"


@pytest.fixture(scope="session")
def chromium():
    """The path of Chromium. Without it the test is skipped on a developer's machine, and fails in CI."""
    found = shutil.which("chromium")
    if found is None and not os.environ.get("CI"):
        pytest.skip("no chromium on this machine")
    assert found is not None, "install chromium"
    return found


@pytest.fixture
def browse(chromium, tmp_path):
    """browse(url, *options, polls=3) -> the document after some polls, and what the browser logged. Time
    passes in the page as fast as the gateway answers."""

    def run(url, *options, polls=3):
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
        command += ["--disable-dev-shm-usage", "--disable-background-networking", "--no-proxy-server"]
        command += [f"--virtual-time-budget={1000 * polls}", *options, "--dump-dom", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return run


@pytest.fixture
def corner():
    """corner(file) -> red, green and blue of the first pixel of a PNG file."""

    def read(file):
        data, position, pixels = file.read_bytes(), 8, b""
        while position < len(data):
            size, kind = struct.unpack_from(">I4s", data, position)
            if kind == b"IDAT":
                pixels += data[position + 8 : position + 8 + size]
            position += 12 + size
        # Of the first pixel all filters of PNG store the colour itself, after the byte with the filter.
        return tuple(zlib.decompress(pixels)[1:4])

    return read


@pytest.fixture(scope="session")
def unavailable():
    """A status that does not come."""
    return grpc.StatusCode.UNAVAILABLE, "no directory"
