"""The cluster token: the secret by which the processes of one cluster know one another (invariant 12).

Each process reads it from a file and proves it on its connections: ``peers`` on gRPC calls,
``attention_offload.transport.handshake`` on sockets. Only the file's path travels between processes. Must not
know what a connection carries.
"""

import hmac
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Self

from farshore.errors import InvalidRequest

VARIABLE = "FARSHORE_TOKEN_FILE"
"""The environment variable that names the file where no option does."""

KEY_BYTES = 32
PROOF_BYTES = 32
_MOST_FILE_BYTES = 4096


def making(path: str | Path) -> str:
    """How to make a token's file, for messages."""
    return f"make one with `(umask 077; openssl rand -hex 32 > {path})`"


@dataclass(frozen=True, slots=True)
class ClusterToken:
    """The token in the file ``path``. It can't be pickled: it never leaves its process."""

    path: Path
    _key: bytes = field(repr=False)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Raises InvalidRequest, with the fix, for a file that is missing, that other users may read, or that
        holds no token."""
        path = Path(path)
        make = f"{making(path)} and copy it to every node"
        try:
            # Opening a pipe without O_NONBLOCK would wait for its writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise InvalidRequest(
                f"the token file {path} can't be read: {error.strerror or error}: {make}"
            ) from error
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise InvalidRequest(f"the token file {path} is no ordinary file: {make}")
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise InvalidRequest(
                    f"the token file {path} has mode {stat.S_IMODE(mode):o}: other users may use it: "
                    f"run `chmod 600 {path}`"
                )
            text = os.read(descriptor, _MOST_FILE_BYTES + 1)
        finally:
            os.close(descriptor)
        try:
            key = bytes.fromhex(text.decode("ascii")) if len(text) <= _MOST_FILE_BYTES else b""
        except ValueError:
            key = b""
        if len(key) < KEY_BYTES:
            raise InvalidRequest(
                f"the token file {path} holds no token, which is {2 * KEY_BYTES} hex digits or more: {make}"
            )
        return cls(path, key)

    @classmethod
    def of_node(cls, path: str | None) -> Self | None:
        """The token of this node: in the file that the environment of the node's Ray names, or else in the
        file ``path``, which the cluster's configuration gives for every node. None without either."""
        path = os.environ.get(VARIABLE) or path
        return cls.read(path) if path else None

    @classmethod
    def make(cls, path: Path) -> Self:
        """Makes a random token in a new file of mode 0600. Raises FileExistsError."""
        key = secrets.token_bytes(KEY_BYTES)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(key.hex())
        return cls(path, key)

    def proof(self, label: bytes, message: bytes) -> bytes:
        """PROOF_BYTES that only this token makes of ``message``. ``label`` tells one use from the others, so
        that a proof of one use is not valid in another."""
        return proof(self._key, label, message)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a cluster token does not leave its process: send its path")


def proof(key: bytes, label: bytes, message: bytes) -> bytes:
    """See :meth:`ClusterToken.proof`."""
    return hmac.digest(key, label + b"\0" + message, "sha256")
