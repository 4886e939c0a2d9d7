"""A directory is opened by its URL."""

import pytest

from farshore.errors import InvalidRequest
from farshore.kvstore.directory.connect import open_directory


@pytest.mark.parametrize("url", ["127.0.0.1:5", "http://127.0.0.1:5", "grpc:127.0.0.1:5", "grpc://", ""])
def test_other_urls_are_refused_with_the_fix(url):
    with pytest.raises(InvalidRequest, match="grpc://HOST:PORT"):
        open_directory(url)
