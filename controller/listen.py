"""Checks the address that the gateway is to listen on, before Ray or anything else is started.

Called by ``cluster``, so that a wrong address is reported within a millisecond, and by ``controller`` to
choose where workers listen. Must not know gRPC: the gateway binds the address itself later.
"""

import errno
import random
import socket
from pathlib import Path

from farshore.errors import InvalidRequest, PortInUse

ADVICE = "use 127.0.0.1 for this machine alone, 0.0.0.0 for its whole network, or one of its addresses"

LEAST_PORT = 20_000
"""Of those that are chosen here. Ray's workers listen below."""

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def bracketed(host: str) -> str:
    """``host`` as written in HOST:PORT: an IPv6 address in brackets, whether or not it had them."""
    bare = host.strip("[]")
    return f"[{bare}]" if ":" in bare else bare


def free_port(host: str) -> int:
    """A port of ``host``, an address of this machine, that nothing listens on now.

    A process is to bind it later, and again when it was started again. So it is none of the ephemeral ports,
    if there are others: the kernel gives those to any connection meanwhile, even to one of a client that
    tries to reach this port.
    """
    (family, address), *_ = _resolved(host, 0)
    lasting = _lasting_ports()
    for port in (*random.sample(lasting, len(lasting)), 0):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((address[0], port, *address[2:]))
            except OSError as error:
                if port and error.errno == errno.EADDRINUSE:
                    continue
                raise
            return probe.getsockname()[1]
    raise AssertionError("the kernel chooses the last port")


def _lasting_ports() -> list[int]:
    """The ports from LEAST_PORT on that are not ephemeral; none where the kernel does not say."""
    try:
        first, last = map(int, _EPHEMERAL.read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return []
    return [*range(LEAST_PORT, first), *range(max(LEAST_PORT, last + 1), 1 << 16)]


def check(host: str, port: int, *, option: str = "--port") -> None:
    """Raises PortInUse, or InvalidRequest with the fix, if ``host:port`` can't be listened on.
    ``option``: the one that gives the port.

    All addresses of a name must be free: if the gateway listened on some of them only, clients that use the
    others would reach another server. Addresses that this machine does not have are skipped (``localhost``
    may include ::1 where IPv6 is off), but at least one must remain.
    """
    missing: OSError | None = None
    listening = 0
    for family, address in _resolved(host, port):
        try:
            _bind(family, address)
            listening += 1
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise _refused(host, port, error, option) from error
            missing = error
    if not listening:
        raise InvalidRequest(f"--host {host}: this machine has no such address: {ADVICE}") from missing


def _resolved(host: str, port: int) -> list[tuple[int, tuple]]:
    """(address family, socket address) of each address of ``host``."""
    try:
        found = socket.getaddrinfo(host.strip("[]") or "?", port, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:  # ValueError: an invalid name, such as one of 300 letters
        raise InvalidRequest(f"--host {host[:200]}: no host has this name: {ADVICE}") from error
    return [(family, address) for family, _, _, _, address in found]


def _bind(family: int, address: tuple) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        probe.bind(address)
        probe.listen(1)


def _refused(host: str, port: int, error: OSError, option: str) -> InvalidRequest:
    listen = f"{bracketed(host)}:{port}"
    if error.errno == errno.EADDRINUSE:
        return PortInUse(f"{listen} is taken: stop what listens there, or choose another {option} (0: any)")
    if error.errno == errno.EACCES:
        return InvalidRequest(f"this user may not listen on {listen}: choose a {option} from 1024 on")
    return InvalidRequest(f"cannot listen on {listen}: {error.strerror or error}: choose another --host")
