"""Opens the directory that a URL names.

Called by workers, gateways and the driver, which get the URL as an argument. A URL carries no secret: what
authenticates is in files, which it may name.
"""

from urllib.parse import urlsplit

from farshore.cluster_token import ClusterToken
from farshore.errors import InvalidRequest
from farshore.kvstore.directory.base import Directory
from farshore.kvstore.directory.remote import RemoteDirectory


def open_directory(url: str, *, token: ClusterToken | None = None) -> Directory:
    """The directory at ``grpc://HOST:PORT``, which a controller serves and whose calls prove ``token``.
    Connects with the first call. Raises InvalidRequest for another URL."""
    parts = urlsplit(url)
    if parts.scheme != "grpc" or not parts.netloc:
        raise InvalidRequest(f"directory {url}: use grpc://HOST:PORT")
    return RemoteDirectory(parts.netloc, token=token)
