"""Where the directory is, from ``farshore serve``'s options."""

import pytest

from farshore.controller.config import ClusterConfig


def test_options_and_environment_say_where_redis_is(run, cluster, monkeypatch):
    monkeypatch.setenv("FARSHORE_REDIS_URL", "rediss://me@redis:7000/3")
    monkeypatch.setenv("FARSHORE_REDIS_CERT_FILE", "/run/cert")
    options = ("--redis-password-file", "/run/password", "--redis-key-file", "/run/key")
    assert run("serve", *options, "--redis-ca-file", "/run/ca", "--name", "blue").code == 0
    address = cluster.config.redis
    assert address.url == (
        "rediss://me@redis:7000/3?password_file=%2Frun%2Fpassword&ca_file=%2Frun%2Fca"
        "&cert_file=%2Frun%2Fcert&key_file=%2Frun%2Fkey&cluster=blue"
    )


def test_without_them_the_controller_keeps_the_directory():
    assert ClusterConfig().redis is None


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        (("--redis-url", "http://redis"), "redis://"),
        (("--redis-url", "redis://:secret@redis"), "--redis-password-file"),
        (("--redis-url", "redis://redis", "--redis-ca-file", "/ca"), "rediss://"),
        (("--redis-url", "rediss://redis", "--redis-cert-file", "/cert"), "together"),
        (("--redis-password-file", "/password"), "--redis-url"),
    ],
)
def test_options_that_cannot_work_name_the_fix(run, cluster, options, fix):
    done = run("serve", *options)
    assert done.code == 2 and fix in done.err and "secret" not in done.err
