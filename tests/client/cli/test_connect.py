"""await_gateway waits for a gateway that listens, even a slow one; only a refused connection means none."""

import contextlib
import socket
import threading

import pytest

from farshore.client.cli import connect as cli_connect
from farshore.client.cli.connect import await_gateway
from farshore.client.sdk import Client
from farshore.errors import TransportError


@pytest.fixture
def silent():
    """The address of a listener that never answers, like a frozen gateway."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


class SlowProxy:
    """A TCP proxy before a gateway that forwards nothing until ``go`` is set."""

    def __init__(self, gateway):
        self.go = threading.Event()
        self._gateway = gateway
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = []
        self._start(self._accept)

    def close(self):
        self.go.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(60)

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                self._start(self._forward, self._listener.accept()[0])

    def _forward(self, client):
        host, _, port = self._gateway.rpartition(":")
        # When one side closes its connection, the other side's is closed too.
        with client, contextlib.suppress(OSError):
            assert self.go.wait(60)
            with socket.create_connection((host, int(port))) as server:
                pumps = [self._start(_pump, *ends) for ends in ((client, server), (server, client))]
                for pump in pumps:
                    pump.join()

    def _start(self, work, *arguments):
        thread = threading.Thread(target=work, args=arguments)
        self._threads.append(thread)
        thread.start()
        return thread


def _pump(source, target):
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def slow(farshore):
    """A SlowProxy before a gateway."""
    proxy = SlowProxy(farshore.address)
    yield proxy
    proxy.close()


@pytest.fixture
def no_patience(monkeypatch):
    """Commands give up at once on a listener that does not answer."""
    monkeypatch.setattr(cli_connect, "ANSWER_DEADLINE_S", 0.0)


def waited(servers, notify):
    """What await_gateway returns."""
    with Client(servers) as client:
        return await_gateway(client, notify)


def test_a_gateway_that_serves(farshore, monkeypatch):
    monkeypatch.setattr(cli_connect, "PROBE_S", 60.0)  # The machine may be busy.
    notes = []
    assert waited(farshore.address, notes.append)
    assert not notes


def test_nothing_listens(absent):
    notes = []
    assert not waited(absent, notes.append)
    assert not notes


def test_a_slow_gateway_is_waited_for(slow):
    notes = []

    def tell(text):
        notes.append(text)
        slow.go.set()

    assert waited(slow.address, tell)
    assert len(notes) == 1 and slow.address in notes[0]


def test_a_silent_listener_is_an_error_after_the_deadline(silent, no_patience):
    with pytest.raises(TransportError, match=f"listens at {silent} did not answer as a gateway"):
        waited(silent, lambda _: None)


@pytest.mark.parametrize("address", ["no-such-host.invalid:50051", "a..b:1"])
def test_a_host_that_does_not_exist(address):
    with pytest.raises(TransportError, match="can't be reached"):
        waited(address, lambda _: None)


def test_generate_starts_no_second_cluster_beside_a_silent_gateway(
    run, cluster, silent, no_patience, monkeypatch
):
    monkeypatch.setattr("farshore.client.cli.connect.DEFAULT_SERVER", silent)
    done = run("generate", "Hi")
    assert done.code == 3
    assert "did not answer as a gateway" in done.err
    assert cluster.config is None


@pytest.mark.parametrize("command", [("generate", "Hi"), ("status",)])
def test_a_silent_server_and_an_absent_one_get_different_errors(
    run, cluster, silent, absent, no_patience, command
):
    assert "did not answer as a gateway" in run(*command, "--server", silent).err
    assert "no gateway answers" in run(*command, "--server", absent).err
    assert cluster.config is None


def test_one_gateway_of_several_is_enough(run, farshore, silent, absent, cluster):
    farshore.engine.auto = ()
    assert run("generate", "Hi", "--server", f"{absent},{silent}", "--server", farshore.address).code == 0
    assert run("status", "--server", silent, "--server", absent, "--server", farshore.address).code == 0
    unknown = "no-such-host.invalid:1"
    assert run("status", "--server", f"{unknown}, {farshore.address}").code == 0
    assert "can't be reached" in run("status", "--server", f"{unknown},{absent}").err
    assert f"at {absent} or 127.0.0.1:1:" in run("status", "--server", f"{absent},127.0.0.1:1").err
    assert cluster.config is None


@pytest.fixture
def web_proxy(monkeypatch):
    """The listening socket of a web proxy to which the environment points."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(60)
        for name in ("http_proxy", "https_proxy", "grpc_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("no_proxy", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield proxy


def test_a_gateway_on_this_machine_is_called_without_the_web_proxy(web_proxy, farshore):
    port = farshore.address.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        with Client(f"{host}:{port}") as client:
            assert client.is_serving(timeout_s=60), host


def test_a_gateway_elsewhere_is_called_through_the_web_proxy(web_proxy):
    with Client("gateway.invalid:50051") as client:
        asking = threading.Thread(target=client.is_serving, kwargs={"timeout_s": 60})
        asking.start()
        connection, _ = web_proxy.accept()
        with connection:
            assert connection.recv(1000).startswith(b"CONNECT gateway.invalid:50051 ")
            connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
        asking.join(60)
    assert not asking.is_alive()
