"""listen.check and its helpers, with the machine's own sockets."""

import socket
from pathlib import Path

import pytest

from farshore.controller import listen
from farshore.errors import InvalidRequest, PortInUse


def _has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


NEEDS_IPV6 = pytest.mark.skipif(not _has_ipv6(), reason="no IPv6 on this machine")
IPV6 = [pytest.param(host, marks=NEEDS_IPV6) for host in ("::1", "[::1]", "::")]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "0.0.0.0", *IPV6])
def test_addresses_of_this_machine(host):
    listen.check(host, 0)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("192.0.2.1", "no such address"),
        ("2001:db8::1", "no such address"),
        ("no-such-host.invalid", "no host has this name"),
        ("127.0.0.1.", "no host has this name"),
        ("127.0.0.300", "no host has this name"),
        ("", "no host has this name"),
        ("a..b", "no host has this name"),
        ("x" * 300, "no host has this name"),
        ("nul\0", "no host has this name"),
    ],
)
def test_other_hosts_are_refused_with_the_fix(host, expected):
    with pytest.raises(InvalidRequest, match="--host") as refused:
        listen.check(host, 50051)
    message = str(refused.value)
    assert expected in message and "127.0.0.1" in message and len(message) < 500


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.2", "localhost", pytest.param("::1", marks=NEEDS_IPV6)]
)
def test_a_taken_port_is_refused(host):
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as taken:
        taken.bind(address)
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=rf"{port} is taken.*--port"):
            listen.check(host, port)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", pytest.param("::1", marks=NEEDS_IPV6)])
def test_a_free_port_is_given_to_no_connection_meanwhile(host):
    """As the kernel's own range says, which is this machine's."""
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = {listen.free_port(host) for _ in range(20)}
    assert len(ports) > 1
    assert not any(first <= port <= last for port in ports)
    for port in ports:
        listen.check(host, port)


def test_a_taken_port_is_not_chosen(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(listen, "_lasting_ports", lambda: [port])
        assert listen.free_port("127.0.0.1") not in (0, port)


@pytest.mark.parametrize("text", ["1024\t65535\n", "", None])
def test_where_all_ports_are_ephemeral_the_kernel_chooses(monkeypatch, tmp_path, text):
    monkeypatch.setattr(listen, "LEAST_PORT", 1024)
    file = tmp_path / "range"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(listen, "_EPHEMERAL", file)
    assert listen.free_port("127.0.0.1") > 0


@pytest.mark.parametrize(
    ("host", "expected"),
    [("::1", "[::1]"), ("[::1]", "[::1]"), ("127.0.0.1", "127.0.0.1"), ("localhost", "localhost")],
)
def test_ipv6_gets_brackets(host, expected):
    assert listen.bracketed(host) == expected
