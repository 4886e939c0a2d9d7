"""Finds out whether a gateway runs at an address, and waits for a gateway that is slow to answer.

Called by ``generate`` and ``status``. Only a refused connection means that no gateway runs: if a slow gateway
counted as absent, ``generate`` would start a second cluster, which would take memory and cores from the
first.
"""

import socket
import time
from collections.abc import Callable

from farshore.client.sdk import Client
from farshore.errors import TransportError

ANSWER_DEADLINE_S = 30.0
"""For a listener to answer as a gateway that serves."""

PROBE_S = 1.0
CONNECT_DEADLINE_S = 5.0


def await_gateway(address: str, notify: Callable[[str], None], *, to_serve: bool = True) -> bool:
    """Blocks until a gateway answers at ``address`` and returns True; False if nothing listens there.

    ``to_serve``: wait until the gateway is ready. ``notify`` is called once if there is something to wait
    for. Raises TransportError if the host can't be reached, or if something listens but does not answer
    within ANSWER_DEADLINE_S.
    """
    with Client(address) as client:
        answers = client.is_serving if to_serve else client.is_up
        if answers(timeout_s=PROBE_S):
            return True
        if not _listens(address):
            return False
        notify(f"waiting for the gateway at {address}: something listens there but does not answer yet")
        until_s = time.monotonic() + ANSWER_DEADLINE_S
        while time.monotonic() < until_s:
            begun_s = time.monotonic()
            if answers(timeout_s=PROBE_S):
                return True
            # A listener that refuses at once is asked no more often than one that does not answer.
            time.sleep(max(0.0, begun_s + PROBE_S - time.monotonic()))
            if not _listens(address):
                return False
    raise TransportError(
        f"what listens at {address} did not answer as a gateway within {ANSWER_DEADLINE_S:.0f} s: it is busy,"
        " has failed, or is no Farshore gateway; look at its output, or give another --server"
    )


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
