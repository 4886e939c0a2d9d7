"""Clusters whose nodes have another token than ``farshore serve``, or none: the command says why it ends."""

import pytest

from farshore.cluster_token import VARIABLE, ClusterToken


@pytest.fixture
def another(tmp_path):
    return ClusterToken.make(tmp_path / "another").path


def ends_with(marked, *options):
    """What ``farshore serve`` says when it ends by itself."""
    done = marked.run("serve", "--port", "0", "--kv-memory", "64MiB", *options)
    assert done.returncode == 1
    return done.stderr


@pytest.mark.heavy
def test_another_token_than_a_nodes(marked, start_ray, monkeypatch, another, tmp_path):
    """First another than Ray's, then another than what the node's environment names for workers, then a file
    that is not there."""
    of_node = ClusterToken.make(tmp_path / "of_node").path
    monkeypatch.setenv(VARIABLE, str(of_node))
    address, ray_token = start_ray()
    said = ends_with(marked, "--ray-address", address, "--token-file", str(another))
    assert f"refuses the token in {another}" in said
    joining = ("--ray-address", address, "--token-file", ray_token)
    assert "the directory: the caller's cluster token is another" in ends_with(marked, *joining)
    of_node.unlink()
    said = ends_with(marked, *joining)
    assert f"could not start: the token file {of_node} can't be read" in said
