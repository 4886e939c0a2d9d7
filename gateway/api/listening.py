"""Addresses that a gateway listens on, and the reason why one can't be listened on.

Used by ``server`` for gRPC and by ``http``. Must not know what is served there.
"""

import errno
import socket

from farshore.errors import InvalidRequest, PortInUse


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT; the brackets around an IPv6 host are kept. Raises InvalidRequest."""
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) <= 65535):
        raise InvalidRequest(f"{address!r} is no address: use HOST:PORT, such as 127.0.0.1:50051")
    return host, int(port)


def listening_socket(listen: str, *, backlog: int) -> socket.socket:
    """A socket that listens at HOST:PORT ``listen``; port 0: any free one. Raises PortInUse, or
    InvalidRequest, if it can't."""
    host, port = split_address(listen)
    try:
        family, kind, *_, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(backlog)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            why = error.strerror or error
            raise InvalidRequest(f"cannot listen on {listen}: {why}; use another --host") from error
        raise PortInUse(
            f"port {port} on {host} is taken: stop what listens there, or choose another --port (0: any)"
        ) from error
    return listener


def bind_error(listen: str) -> InvalidRequest:
    """The reason why ``listen`` can't be bound, found by binding a socket: gRPC does not report it."""
    try:
        listening_socket(listen, backlog=1).close()
    except InvalidRequest as error:
        return error
    return PortInUse(f"{listen} is taken: stop what listens there, or choose another --port (0: any)")
