"""Finds out whether a gateway runs at an address, and waits for gateways that are slow to answer.

Called by the commands that use a gateway. Only a refused connection means that no gateway runs: if a
slow gateway counted as absent, ``generate`` would start a second cluster, which would take memory and cores
from the first.
"""

import argparse
import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence

from farshore.client.cli.options.cluster import cluster_config
from farshore.client.cli.options.gateway import no_gateway
from farshore.client.cli.options.values import DEFAULT_SERVER
from farshore.client.cli.terminal import Progress
from farshore.client.sdk import Client
from farshore.errors import TransportError
from farshore.model_spec import DEMO

ANSWER_DEADLINE_S = 30.0
"""For a listener to answer as a gateway that serves."""

CALL_DEADLINE_S = 10.0
PROBE_S = 1.0
CONNECT_DEADLINE_S = 5.0


def connected(args: argparse.Namespace) -> Client:
    """A client of the gateways ``args.server``, one of which answers: also one that is not ready, since it
    reports the status all the same. Raises TransportError."""
    progress = Progress()
    client = Client(args.server, timeout_s=args.timeout or CALL_DEADLINE_S)
    try:
        if not await_gateway(client, progress.step, to_serve=False, within_s=args.timeout):
            raise no_gateway(args.server)
    except BaseException:
        client.close()
        raise
    finally:
        progress.clear()
    return client


@contextlib.contextmanager
def running_or_own(
    args: argparse.Namespace, progress: Progress, take_signals: Callable[[], None]
) -> Iterator[Client]:
    """Yields a client of the running gateways, or of a cluster that lives as long as the context. ``args``:
    of ``add_own_cluster_options``. Raises TransportError and StartupError."""
    with Client(args.server or DEFAULT_SERVER) as client:
        if await_gateway(client, progress.step, within_s=args.timeout):
            progress.clear()
            yield client
            return
    if args.server:
        raise no_gateway(args.server)
    config = cluster_config(args, (), model=args.model or DEMO, port=0)
    # Imported here: Ray takes most of a second, which a call to a running gateway need not pay.
    from farshore.controller.driver.cluster import Cluster

    progress.note(
        f"farshore: no gateway at {DEFAULT_SERVER}: starting a cluster for this call (`farshore serve` keeps "
        "one)"
    )
    with Cluster.start(config, progress=progress.step) as cluster:
        take_signals()
        progress.clear()
        with Client(cluster.address) as client:
            yield client


def await_gateway(
    client: Client,
    notify: Callable[[str], None],
    *,
    to_serve: bool = True,
    within_s: float | None = None,
) -> bool:
    """Blocks until one of the client's gateways answers, which the client then uses, and returns True; False
    if nothing listens at any of their addresses.

    ``to_serve``: wait until the gateway is ready. ``notify`` is called once if there is something to wait
    for. Raises TransportError if no host can be reached, or if something listens but does not answer within
    ``within_s``; None: ANSWER_DEADLINE_S.
    """
    deadline_s = ANSWER_DEADLINE_S if within_s is None else within_s
    until_s = time.monotonic() + deadline_s
    answers = client.is_serving if to_serve else client.is_up
    if answers(timeout_s=PROBE_S if within_s is None else min(PROBE_S, within_s)):
        return True
    listening = _listening(client.addresses)
    if not listening:
        return False
    where = " and ".join(listening)
    notify(f"waiting for the gateway at {where}: something listens there but does not answer yet")
    while time.monotonic() < until_s:
        begun_s = time.monotonic()
        if answers(timeout_s=PROBE_S):
            return True
        # A listener that refuses at once is asked no more often than one that does not answer.
        time.sleep(max(0.0, begun_s + PROBE_S - time.monotonic()))
        if not _listening(client.addresses):
            return False
    raise TransportError(
        f"what listens at {where} did not answer as a gateway within {deadline_s:g} s: it is busy,"
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
