"""The file of the cluster token: what is refused, and that the secret stays in its process."""

import os
import pickle
import stat

import pytest

from farshore.cluster_token import KEY_BYTES, PROOF_BYTES, ClusterToken
from farshore.errors import InvalidRequest


@pytest.fixture
def file(tmp_path):
    """file(text, mode=0o600) -> its path."""

    def write(text, mode=0o600):
        path = tmp_path / "token"
        path.write_text(text)
        path.chmod(mode)
        return path

    return write


def test_a_made_token_is_read_again(tmp_path):
    path = tmp_path / "token"
    made = ClusterToken.make(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(bytes.fromhex(path.read_text())) == KEY_BYTES
    assert ClusterToken.read(path) == made == ClusterToken.read(str(path))
    with pytest.raises(FileExistsError):
        ClusterToken.make(path)


def test_two_tokens_differ(tmp_path):
    a, b = (ClusterToken.make(tmp_path / name) for name in "ab")
    assert len(a.proof(b"x", b"y")) == PROOF_BYTES
    proofs = [a.proof(b"x", b"y"), b.proof(b"x", b"y"), a.proof(b"z", b"y"), a.proof(b"x", b"z")]
    assert len(set(proofs)) == len(proofs)


@pytest.mark.parametrize("text", ["ab" * 32, "AB" * 32 + "\n", "  " + "0f" * 64 + "\r\n"])
def test_what_openssl_and_editors_write_is_read(file, text):
    assert ClusterToken.read(file(text))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o602, 0o610, 0o777])
def test_a_file_that_others_may_use_is_refused(file, mode):
    path = file("ab" * 32, mode)
    with pytest.raises(InvalidRequest, match=f"mode {mode:o}.*chmod 600 {path}"):
        ClusterToken.read(path)


@pytest.mark.parametrize(
    "text", ["", "\n", "ab" * 31, "ab" * 31 + "a", "zz" * 32, "ab" * 31 + " xy", "é" * 64, "ab" * 3000 + "x"]
)
def test_a_file_without_a_token_is_refused(file, text):
    path = file(text)
    with pytest.raises(
        InvalidRequest, match=f"holds no token, .*64 hex digits.*openssl rand -hex 32 > {path}"
    ):
        ClusterToken.read(path)


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, reason in (("none", "No such file"), ("pipe", "no ordinary file"), (".", "no ordinary file")):
        with pytest.raises(InvalidRequest, match=f"{reason}.*openssl rand"):
            ClusterToken.read(tmp_path / name)


def test_the_secret_does_not_leave_the_process(tmp_path):
    token = ClusterToken.make(tmp_path / "token")
    secret = token.path.read_text()
    assert secret not in repr(token) and bytes.fromhex(secret).hex() not in str(token)
    with pytest.raises(TypeError, match="send its path"):
        pickle.dumps(token)
