"""Where a Redis is and how to reach it, as one URL.

Made from the options by ``controller.config``; parsed by workers, gateways and the controller. The URL is an
argument of processes and of Ray's actors, which others can read: so it names files instead of carrying what
they hold. It must not import the redis package, which a thin install lacks.
"""

import re
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from farshore.errors import InvalidRequest

SCHEMES = ("redis", "rediss")
DEFAULT_PORT = 6379
DEFAULT_CLUSTER = "default"

FORM = "redis://[USER@]HOST[:PORT][/DB]"
_CLUSTER = re.compile(r"[A-Za-z0-9._-]{1,64}")
_FILES = ("password_file", "ca_file", "cert_file", "key_file")


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisAddress:
    """Raises InvalidRequest for values that can't work together. Paths are those of the process that
    connects."""

    host: str
    port: int = DEFAULT_PORT
    database: int = 0
    tls: bool = False
    username: str = ""
    password: str = field(default="", repr=False)
    """Not part of :attr:`url`."""
    password_file: str = ""
    """Holds the password; read at each connection, so that it may change."""
    ca_file: str = ""
    """Certificates that sign the server's; empty: those of the system."""
    cert_file: str = ""
    """This client's certificate, if the server asks for one."""
    key_file: str = ""
    cluster: str = DEFAULT_CLUSTER
    """Several clusters may share a Redis: each has its keys under its name."""

    def __post_init__(self) -> None:
        if not _CLUSTER.fullmatch(self.cluster):
            raise InvalidRequest(
                f"cluster {self.cluster[:80]!r}: use 1 to 64 letters, digits, dots, underscores and hyphens"
            )
        if not self.tls and (self.ca_file or self.cert_file or self.key_file):
            raise InvalidRequest(f"{self}: certificates need TLS: use rediss:// instead of redis://")
        if bool(self.cert_file) != bool(self.key_file):
            raise InvalidRequest(f"{self}: give the certificate's file and the key's file together")
        if self.password and self.password_file:
            raise InvalidRequest(f"{self}: give the password in the URL or in a file, not both")

    @classmethod
    def parse(cls, url: str) -> Self:
        """``redis://[user:password@]host[:port][/db]``, or ``rediss://`` for TLS, with ``cluster``,
        ``password_file``, ``ca_file``, ``cert_file`` and ``key_file`` as query. Raises InvalidRequest, whose
        message never has the password."""
        try:
            parts = urlsplit(url)
            port = parts.port or DEFAULT_PORT
            options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        except ValueError as error:
            raise InvalidRequest(f"this is no URL of a Redis: use {FORM}") from error
        if parts.scheme not in SCHEMES or not parts.hostname or parts.fragment:
            raise InvalidRequest(f"this is no URL of a Redis: use {FORM}")
        database = parts.path.strip("/") or "0"
        if not (database.isascii() and database.isdigit()):
            raise InvalidRequest(f"redis: database {database[:80]!r}: use a number, as in {FORM}")
        if unknown := options.keys() - {"cluster", *_FILES}:
            raise InvalidRequest(
                f"redis: unknown option {min(unknown)[:80]!r} in the URL: use cluster, {', '.join(_FILES)}"
            )
        return cls(
            host=parts.hostname,
            port=port,
            database=int(database),
            tls=parts.scheme == "rediss",
            username=unquote(parts.username or ""),
            password=unquote(parts.password or ""),
            **options,
        )

    @property
    def url(self) -> str:
        """What :meth:`parse` reads, without the password."""
        options = {name: value for name in _FILES if (value := getattr(self, name))}
        if self.cluster != DEFAULT_CLUSTER:
            options["cluster"] = self.cluster
        user = f"{quote(self.username, safe='')}@" if self.username else ""
        return self._location(user) + (f"?{urlencode(options)}" if options else "")

    @property
    def prefix(self) -> str:
        """Of all keys of the cluster. In braces, so that a Redis Cluster keeps them together."""
        return f"farshore:{{{self.cluster}}}:"

    def __str__(self) -> str:
        """For messages: without user and password."""
        return self._location("")

    def _location(self, user: str) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{SCHEMES[self.tls]}://{user}{host}:{self.port}/{self.database}"
