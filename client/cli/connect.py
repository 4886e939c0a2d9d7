"""Finds out whether a gateway runs at an address, and waits for gateways that are slow to answer.

Called by ``generate``, ``status`` and ``operate``. Only a refused connection means that no gateway runs: if a
slow gateway counted as absent, ``generate`` would start a second cluster, which would take memory and cores
from the first.
"""

import socket
import time
from collections.abc import Callable, Sequence

from farshore.client.sdk import Client
from farshore.errors import TransportError

ANSWER_DEADLINE_S = 30.0
"""For a listener to answer as a gateway that serves."""

PROBE_S = 1.0
CONNECT_DEADLINE_S = 5.0


def await_gateway(client: Client, notify: Callable[[str], None], *, to_serve: bool = True) -> bool:
    """Blocks until one of the client's gateways answers, which the client then uses, and returns True; False
    if nothing listens at any of their addresses.

    ``to_serve``: wait until the gateway is ready. ``notify`` is called once if there is something to wait
    for. Raises TransportError if no host can be reached, or if something listens but does not answer within
    ANSWER_DEADLINE_S.
    """
    answers = client.is_serving if to_serve else client.is_up
    if answers(timeout_s=PROBE_S):
        return True
    listening = _listening(client.addresses)
    if not listening:
        return False
    where = " and ".join(listening)
    notify(f"waiting for the gateway at {where}: something listens there but does not answer yet")
    until_s = time.monotonic() + ANSWER_DEADLINE_S
    while time.monotonic() < until_s:
        begun_s = time.monotonic()
        if answers(timeout_s=PROBE_S):
            return True
        # A listener that refuses at once is asked no more often than one that does not answer.
        time.sleep(max(0.0, begun_s + PROBE_S - time.monotonic()))
        if not _listening(client.addresses):
            return False
    raise TransportError(
        f"what listens at {where} did not answer as a gateway within {ANSWER_DEADLINE_S:.0f} s: it is busy,"
        " has failed, or is no Farshore gateway; look at its output, or give another --server"
    )


def _listening(addresses: Sequence[str]) -> list[str]:
    """The addresses where something listens. Raises TransportError if there is none and a host can't be
    reached."""
    found, unreached = [], None
    for address in addresses:
        try:
            if _listens(address):
                found.append(address)
        except TransportError as error:
            unreached = unreached or error
    if unreached is not None and not found:
        raise unreached
    return found


def _listens(address: str) -> bool:
    """False only if the connection is refused: a slow gateway accepts connections or lets them time out.
    Raises TransportError if the host can't be reached."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_DEADLINE_S).close()
    except ConnectionRefusedError:
        return False
    except TimeoutError:
        return True
    except (OSError, ValueError) as error:  # ValueError: an invalid host name
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise TransportError(f"{address} can't be reached: {why}") from error
    return True
