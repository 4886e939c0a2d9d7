"""Where the gateway is to listen, checked in a millisecond before Ray or anything else has started.

Used by the driver (``cluster``) and, for where the workers listen, by the controller. Must not know gRPC: the
gateway's own bind has the last word.
"""

import errno
import ipaddress
import socket

from farshore.errors import InvalidRequest, PortInUse

ADVICE = "use 127.0.0.1 for this machine alone, 0.0.0.0 for its whole network, or one of its addresses"


def bracketed(host: str) -> str:
    """The host as it stands in HOST:PORT: an IPv6 address in brackets."""
    bare = host.strip("[]")
    return f"[{bare}]" if ":" in bare else bare


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``. Raises InvalidRequest for a name that is no host's."""
    return all(ipaddress.ip_address(_scopeless(address[0])).is_loopback for _, address in _resolved(host, 0))


def check(host: str, port: int) -> None:
    """Raises PortInUse, or InvalidRequest with the fix, where ``host:port`` can't be listened on.

    A name may have several addresses, and each must be free: a server on one of them alone would answer some
    of its clients and leave the others to another server. Addresses that this machine doesn't have are passed
    over, as ``localhost`` may name ::1 where IPv6 is off; one must remain.
    """
    missing: OSError | None = None
    listening = 0
    for family, address in _resolved(host, port):
        try:
            _bind(family, address)
            listening += 1
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise _refused(host, port, error) from error
            missing = error
    if not listening:
        raise InvalidRequest(f"--host {host}: this machine has no such address: {ADVICE}") from missing


def _resolved(host: str, port: int) -> list[tuple[int, tuple]]:
    """(address family, socket address) of each address of ``host``."""
    try:
        found = socket.getaddrinfo(host.strip("[]") or "?", port, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:  # ValueError: no name at all, such as one of 300 letters
        raise InvalidRequest(f"--host {host[:200]}: no host has this name: {ADVICE}") from error
    return [(family, address) for family, _, _, _, address in found]


def _scopeless(address: str) -> str:
    return address.partition("%")[0]


def _bind(family: int, address: tuple) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        probe.bind(address)
        probe.listen(1)


def _refused(host: str, port: int, error: OSError) -> InvalidRequest:
    listen = f"{bracketed(host)}:{port}"
    if error.errno == errno.EADDRINUSE:
        return PortInUse(f"{listen} is taken: stop what listens there, or choose another --port (0: any)")
    if error.errno == errno.EACCES:
        return InvalidRequest(f"this user may not listen on {listen}: choose a --port from 1024 on")
    return InvalidRequest(f"cannot listen on {listen}: {error.strerror or error}: choose another --host")
