"""Opens the directory that a URL names.

Called by workers, gateways, the driver and the controller, which get the URL as an argument. A URL carries no
secret: it names files that hold them.
"""

from urllib.parse import urlsplit

from farshore.cluster_token import ClusterToken
from farshore.errors import FarshoreError, InvalidRequest, Unauthenticated
from farshore.kvstore.directory.base import Directory, DurableDirectory
from farshore.kvstore.directory.redis import address
from farshore.kvstore.directory.remote import RemoteDirectory


def open_directory(url: str, *, token: ClusterToken | None = None) -> Directory:
    """The directory at ``grpc://HOST:PORT``, which a controller serves and whose calls prove ``token``, or in
    Redis: see :func:`open_redis`. Connects with the first call. Raises InvalidRequest for another URL."""
    scheme, _, place = url.partition("://")
    if scheme in address.SCHEMES:
        return open_redis(url)
    if scheme != "grpc" or urlsplit(url).netloc != place or not place:
        # Not echoed: it may hold a password.
        raise InvalidRequest(f"this is no URL of a directory: use grpc://HOST:PORT, or {address.FORM}")
    return RemoteDirectory(place, token=token)


def open_redis(url: str) -> DurableDirectory:
    """The directory in the Redis at a URL of :meth:`RedisAddress.parse`. Connects with the first call. Raises
    InvalidRequest for another URL, and where the redis package or a named file is missing."""
    place = address.RedisAddress.parse(url)
    try:
        # An optional backend: a process without it need not load it.
        from farshore.kvstore.directory.redis.directory import RedisDirectory
    except ModuleNotFoundError as error:
        raise InvalidRequest(f"{place}: install the redis package: pip install redis") from error
    return RedisDirectory(place)


def check_token(directory: Directory) -> None:
    """Raises Unauthenticated if the directory refuses this process's token: then it is the fault of a file,
    and asking again does not help. A directory that does not answer passes."""
    try:
        directory.listing()
    except Unauthenticated:
        raise
    except FarshoreError:
        return
