"""A directory is opened by its URL, which carries no secret."""

import pytest

from farshore.errors import InvalidRequest
from farshore.kvstore.directory.connect import open_directory, open_redis
from farshore.kvstore.directory.redis.address import RedisAddress


@pytest.mark.parametrize(
    "url", ["127.0.0.1:5", "http://127.0.0.1:5", "grpc:127.0.0.1:5", "grpc://", "grpc://a/b", ""]
)
def test_other_urls_are_refused_with_the_fix(url):
    with pytest.raises(InvalidRequest, match="grpc://HOST:PORT"):
        open_directory(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:6379/0",
        "redis://reader@redis.example:7000/3?password_file=%2Frun%2Fsecrets%2Fa+b",
        "rediss://a%40b@[::1]:6379/0?ca_file=%2Fca&cert_file=%2Fc&key_file=%2Fk&cluster=blue",
    ],
)
def test_a_url_is_kept(url):
    assert RedisAddress.parse(url).url == url


def test_short_urls_have_defaults():
    address = RedisAddress.parse("redis://redis")
    assert (address.host, address.port, address.database) == ("redis", 6379, 0)
    assert address.prefix == "farshore:{default}:"


def test_the_password_is_in_no_text():
    address = RedisAddress.parse("redis://me:secret@redis:1/2")
    assert (address.username, address.password) == ("me", "secret")
    assert str(address) == "redis://redis:1/2"
    assert "secret" not in address.url + repr(address)


@pytest.mark.parametrize(
    ("url", "fix"),
    [
        ("redis://me:secret@", "redis://"),
        ("redis://me:secret@h:99999", "redis://"),
        ("redis://me:secret@h:x", "redis://"),
        ("redis://me:secret@h/x", "use a number"),
        ("redis://me:secret@h?pasword_file=/a", "password_file"),
        ("redis://me:secret@h?a", "redis://"),
        ("redis://me:secret@h?password_file=/a", "not both"),
        ("redis://me:secret@h?ca_file=/a", "rediss://"),
        ("rediss://me:secret@h?cert_file=/a", "together"),
        ("redis://me:secret@h?cluster=a{b}", "letters"),
        ("rediss://me:secret@h?ca_file=/no/such/file", "no such file"),
        ("http://me:secret@h", "grpc://"),
    ],
)
def test_wrong_urls_name_the_fix_and_no_secret(url, fix):
    with pytest.raises(InvalidRequest) as refused:
        open_directory(url)
    assert fix in str(refused.value) and "secret" not in str(refused.value)


def test_without_the_redis_package_the_error_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "farshore.kvstore.directory.redis.directory", None)
    with pytest.raises(InvalidRequest, match="pip install redis"):
        open_redis("redis://127.0.0.1")
