"""A bounded client of one Redis or Valkey, whose errors are ours.

Used by ``directory``. Every wait of redis-py has its own setting, and each is set here: its defaults wait for
more than 20 s. It must not know what is stored.
"""

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import redis
from redis import exceptions
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.retry import Retry

from farshore import errors
from farshore.kvstore.directory.redis.address import RedisAddress
from farshore.text import shortened

CONNECT_S = 0.5
ANSWER_S = 0.75
"""Longest wait for one answer, and for a free connection. A call takes at most two of these and CONNECT_S: a
connection that broke is made again once, and a timeout is final."""
MOST_CONNECTIONS = 16

_UNREACHABLE = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,
    exceptions.ClusterDownError,
    exceptions.TryAgainError,
)
"""It may answer later: it is away, hangs, loads its data, or is a replica that a failover left behind."""
_REFUSED = (
    exceptions.AuthenticationError,
    exceptions.AuthenticationWrongNumberOfArgsError,
    exceptions.AuthorizationError,
    exceptions.NoPermissionError,
)

T = TypeVar("T")


class RedisClient:
    """Connects with the first call. Thread-safe."""

    def __init__(self, address: RedisAddress) -> None:
        self._address = address
        self._pool = redis.BlockingConnectionPool(
            max_connections=MOST_CONNECTIONS,
            timeout=ANSWER_S,
            connection_class=redis.SSLConnection if address.tls else redis.Connection,
            host=address.host,
            port=address.port,
            db=address.database,
            credential_provider=_Credentials(address),
            socket_connect_timeout=CONNECT_S,
            socket_timeout=ANSWER_S,
            socket_keepalive=True,
            retry=Retry(NoBackoff(), 1, supported_errors=(exceptions.ConnectionError,)),
            # Version 3 lets a server push messages, which this client does not want.
            protocol=2,
            **(_tls(address) if address.tls else {}),
        )
        self._redis = redis.Redis(connection_pool=self._pool)

    def script(self, text: str) -> Callable[..., Any]:
        """A function that runs a script: ``run(keys=[…], args=[…])``. Use it in :meth:`call`."""
        return self._redis.register_script(text)

    def call(self, action: Callable[[redis.Redis], T]) -> T:
        """Runs ``action`` with redis-py's client. Raises TransportError if Redis does not answer, is full or
        can't be written to now, and InvalidRequest if it refuses this client or is no Redis."""
        try:
            return action(self._redis)
        except exceptions.RedisError as error:
            if isinstance(error, exceptions.ReadOnlyError):
                # After a failover the same name may lead to the new primary: look it up again.
                self._pool.disconnect(inuse_connections=False)
            raise _error_of(error, str(self._address)) from error

    def close(self) -> None:
        """Closes the connections. Idempotent."""
        self._pool.disconnect()


class _Credentials(CredentialProvider):
    """Reads the password at each connection, so that a new one needs no restart."""

    def __init__(self, address: RedisAddress) -> None:
        self._address = address

    def get_credentials(self) -> tuple[str] | tuple[str, str] | None:
        password = self._address.password
        if file := self._address.password_file:
            try:
                password = Path(file).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                why = getattr(error, "strerror", None) or "it is not UTF-8"
                raise errors.InvalidRequest(f"{self._address}: password file {file}: {why}") from error
        if self._address.username:
            return (self._address.username, password)
        return (password,) if password else None


def _tls(address: RedisAddress) -> dict[str, Any]:
    for file in filter(None, (address.ca_file, address.cert_file, address.key_file)):
        if not Path(file).is_file():
            raise errors.InvalidRequest(f"{address}: {file}: no such file")
    return {
        "ssl_cert_reqs": "required",
        "ssl_check_hostname": True,
        "ssl_ca_certs": address.ca_file or None,
        "ssl_certfile": address.cert_file or None,
        "ssl_keyfile": address.key_file or None,
        "ssl_min_version": ssl.TLSVersion.TLSv1_2,
    }


def _error_of(error: exceptions.RedisError, shown: str) -> errors.FarshoreError:
    """The FarshoreError to raise, chained. ``shown``: the URL without user and password."""
    why = shortened(str(error))
    if isinstance(error, _REFUSED):
        return errors.InvalidRequest(
            f"{shown} refuses the user, the password or what the user may do ({why}): check the URL, "
            "--redis-password-file and the user's ACL"
        )
    if isinstance(error, exceptions.InvalidResponse):
        return errors.InvalidRequest(f"{shown} is no Redis ({why}): check host and port of the URL")
    if isinstance(error, exceptions.OutOfMemoryError):
        return errors.TransportError(f"{shown} is full: raise its maxmemory ({why})")
    if isinstance(error, _UNREACHABLE):
        return errors.TransportError(f"{shown} does not answer: {why}")
    return errors.Internal(f"{shown}: {type(error).__name__}: {why}")
