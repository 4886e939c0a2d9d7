"""Which gateway a command talks to: one that is there is waited for; where nothing listens there is none.

Used by ``cli_generate`` and ``cli_status``. A second cluster beside one that is slow to answer would take
memory and cores from it: so silence is never taken for absence.
"""

import socket
import time
from collections.abc import Callable

from farshore.client.sdk import Client
from farshore.errors import TransportError

ANSWER_DEADLINE_S = 30.0
"""For what listens to say that it is a gateway and serves."""

PROBE_S = 1.0
CONNECT_DEADLINE_S = 5.0


def await_gateway(address: str, tell: Callable[[str], None], *, to_serve: bool = True) -> bool:
    """Whether a gateway answers at ``address``; False if nothing listens there.

    ``to_serve``: wait for one that is ready, too. ``tell`` hears once that something is waited for. Raises
    TransportError for a host that can't be reached, and for one that listens but doesn't answer within
    ANSWER_DEADLINE_S.
    """
    with Client(address) as client:
        answers = client.is_serving if to_serve else client.is_up
        if answers(timeout_s=PROBE_S):
            return True
        if not _listens(address):
            return False
        tell(f"waiting for the gateway at {address}: something listens there but does not answer yet")
        until_s = time.monotonic() + ANSWER_DEADLINE_S
        while time.monotonic() < until_s:
            begun_s = time.monotonic()
            if answers(timeout_s=PROBE_S):
                return True
            # One that refuses at once is asked no more often than one that is silent.
            time.sleep(max(0.0, begun_s + PROBE_S - time.monotonic()))
            if not _listens(address):
                return False
    raise TransportError(
        f"what listens at {address} did not answer as a gateway within {ANSWER_DEADLINE_S:.0f} s: it is busy,"
        " has failed, or is no Farshore gateway; look at its output, or give another --server"
    )


def _listens(address: str) -> bool:
    """False only where a connection is refused: by then nothing can be slow."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_DEADLINE_S).close()
    except ConnectionRefusedError:
        return False
    except TimeoutError:
        return True
    except (OSError, ValueError) as error:  # ValueError: no host can have this name
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise TransportError(f"{address} can't be reached: {why}") from error
    return True
