"""Finds out within seconds whether a Ray can be joined, and with which token.

Called by ``ray_runtime`` before it joins. Ray itself reports a wrong token after 20 s, as a Ray that is not
there. A client of Ray can run programs on its nodes, and Ray listens on every interface: a Ray that asks for
no token is refused. Must not know what runs on Ray.
"""

import os
import time
from pathlib import Path

import grpc

from farshore import rpc
from farshore.cluster_token import ClusterToken, making
from farshore.errors import InvalidRequest, StartupError

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
"""Ray's settings, as environment variables. It prefers the token to the path."""

DEADLINE_S = 3.0
RETRY_S = 0.5
_METHOD = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""Ray's first call when it joins. It changes nothing, and its request has no field that is needed."""


def token_file(given: str | None) -> str:
    """The absolute path of the cluster's token: ``given``, or else the file of Ray's token that the
    environment names. Raises InvalidRequest for a file that is missing or can't be used."""
    path = given or os.environ.get(TOKEN_PATH)
    if path is None:
        raise InvalidRequest(
            f"--ray-address needs --token-file FILE, the same file on every node: {making('FILE')}"
        )
    path = str(Path(path).absolute())
    ClusterToken.read(path)
    return path


def settings(token_file: str) -> dict[str, str | None]:
    """The environment in which to join a Ray: the one that is set, or else ``token_file`` as Ray's token."""
    given = TOKEN in os.environ or TOKEN_PATH in os.environ
    return {MODE: "token"} if given else {MODE: "token", TOKEN_PATH: token_file}


def check(address: str, token_file: str, *, patience_s: float = 0.0) -> None:
    """Asks the Ray at HOST:PORT ``address`` with and without the token of :func:`settings`. Raises
    StartupError, with the fix, if it does not answer within DEADLINE_S, asks for no token, or refuses it.
    ``patience_s``: asks again for that long while it does not answer."""
    path = os.environ.get(TOKEN_PATH, token_file)
    if TOKEN in os.environ:
        token, origin = os.environ[TOKEN], f"${TOKEN}"
    else:
        token, origin = _read(path), path
    until_s = time.monotonic() + patience_s
    while True:
        refused, error = _asked(address, token)
        if refused[0] or error is None or time.monotonic() >= until_s:
            break
        time.sleep(RETRY_S)
    if refused[0]:
        raise StartupError(
            f"the Ray at {address} refuses the token in {origin}: give --token-file, or {TOKEN_PATH}, the "
            "file with which its nodes were started"
        )
    if error is not None:
        why = f"{error.code().name}: {error.details()}"
        raise StartupError(
            f"no Ray answers at {address} within {DEADLINE_S:g} s ({why}): check --ray-address HOST:PORT, "
            "and that Ray runs there"
        )
    if not refused[1]:
        raise StartupError(
            f"the Ray at {address} asks for no token, so that its whole network can run programs on its "
            f"nodes: start each node with {MODE}=token {TOKEN_PATH}={path}"
        )


def _asked(address: str, token: str) -> tuple[list[bool], grpc.RpcError | None]:
    """Whether Ray refuses a call with the token and one without; and how the first of them failed."""
    with rpc.channel(address, None) as channel:
        ask = channel.unary_unary(_METHOD)
        proven, bare = (
            ask.future(b"", metadata=metadata, timeout=DEADLINE_S)
            for metadata in ([("authorization", f"Bearer {token.strip()}")], [])
        )
        refused = [call.code() is grpc.StatusCode.UNAUTHENTICATED for call in (proven, bare)]
        return refused, proven.exception()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"Ray's token file {path} can't be read: {error}: correct {TOKEN_PATH}") from error
