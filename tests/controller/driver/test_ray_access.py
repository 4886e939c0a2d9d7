"""Whether a Ray can be joined, asked of a stand-in that answers as Ray's GCS does (tried with Ray 2.60)."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import pytest

from farshore.cluster_token import ClusterToken
from farshore.controller.config import ClusterConfig
from farshore.controller.driver import ray_access
from farshore.controller.driver.cluster import Cluster
from farshore.errors import InvalidRequest, StartupError


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (ray_access.MODE, ray_access.TOKEN, ray_access.TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def token(tmp_path):
    return ClusterToken.make(tmp_path / "token").path


@pytest.fixture
def ray():
    """ray(the text of its token, or None) -> its HOST:PORT."""
    servers = []

    def start(secret):
        def answer(request, context):
            given = dict(context.invocation_metadata()).get("authorization")
            if secret is not None and given != f"Bearer {secret}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken: missing or incorrect")
            return b"id"

        handlers = {"GetClusterId": grpc.unary_unary_rpc_method_handler(answer)}
        server = grpc.server(ThreadPoolExecutor(2))
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", handlers)]
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(0).wait()


def test_a_ray_with_the_clusters_token_is_joined(ray, token):
    ray_access.check(ray(token.read_text()), str(token))
    assert ray_access.settings(str(token)) == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def test_a_ray_with_a_token_of_its_own_is_joined_with_that(ray, token, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "rays")
    ray_access.check(ray("rays"), str(token))
    assert ray_access.settings(str(token)) == {"RAY_AUTH_MODE": "token"}
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / "rays").write_text("rays\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "rays"))
    ray_access.check(ray("rays"), str(token))
    assert ray_access.settings(str(token)) == {"RAY_AUTH_MODE": "token"}


def refused(address, token):
    with pytest.raises(StartupError) as caught:
        Cluster.start(
            ClusterConfig(port=0, ray_address=address, token_file=str(token)), progress=lambda _: None
        )
    return str(caught.value)


def test_another_token_is_refused_with_the_fix(ray, token):
    said = refused(address := ray("0" * 64), token)
    assert f"the Ray at {address} refuses the token in {token}" in said
    assert "--token-file" in said and "RAY_AUTH_TOKEN_PATH" in said


def test_a_ray_without_a_token_is_refused_with_the_fix(ray, token):
    said = refused(ray(None), token)
    assert f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token}" in said and "asks for no token" in said


def test_no_ray_there_is_told(token, monkeypatch):
    monkeypatch.setattr(ray_access, "DEADLINE_S", 0.5)
    assert "no Ray answers at 127.0.0.1:1" in refused("127.0.0.1:1", token)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/no/such/file")
    assert "correct RAY_AUTH_TOKEN_PATH" in refused("127.0.0.1:1", token)


def test_a_ray_that_starts_late_is_awaited(ray, token, monkeypatch):
    asked = []

    def ask(address, secret):
        asked.append(address)
        is_late = len(asked) > 2
        monkeypatch.setattr(ray_access, "DEADLINE_S", 60.0 if is_late else 0.2)
        return _asked(ray(token.read_text()) if is_late else "127.0.0.1:1", secret)

    _asked = ray_access._asked
    monkeypatch.setattr(ray_access, "_asked", ask)
    ray_access.check("127.0.0.1:1", str(token), patience_s=300.0)
    assert len(asked) == 3


def test_joining_needs_a_token_that_can_be_used(token):
    """Before anything is started."""
    config = ClusterConfig(port=0, ray_address="127.0.0.1:1")
    with pytest.raises(InvalidRequest, match=r"--ray-address needs --token-file.*openssl rand"):
        Cluster.start(config, progress=lambda _: None)
    token.chmod(0o644)
    for each in (replace(config, token_file=str(token)), ClusterConfig(port=0, token_file=str(token))):
        with pytest.raises(InvalidRequest, match="chmod 600"):
            Cluster.start(each, progress=lambda _: None)


def test_rays_own_token_file_is_the_clusters_if_none_is_given(ray, token, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    address = ray(None)
    with pytest.raises(StartupError, match="asks for no token"):
        Cluster.start(ClusterConfig(port=0, ray_address=address), progress=lambda _: None)
