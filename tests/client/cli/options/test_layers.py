"""The options of ``farshore serve`` from flags, the environment and a file, in this order."""

import pytest

from farshore.client.cli.options.layers import WatchedFile
from farshore.errors import InvalidRequest


@pytest.fixture
def write(tmp_path):
    """write(text) -> the path of a configuration file."""

    def call(text):
        path = tmp_path / "cluster.yaml"
        path.write_text(text)
        return str(path)

    return call


FILE = """
model: org/name
served_model_name: [one, two]
attention-workers: 4
kv-memory: 2GiB
rope-scaling: {rope_type: yarn, factor: 4.0}
max-model-len: 32K
shard-grace: 7
dashboard: true
placement: local
"""


def test_a_file_that_changes_is_applied(run, cluster, write):
    file = write("attention-workers: 2\nkv-memory: 128MiB")
    cluster.on_wait = lambda _: write("attention-workers: 5")
    done = run("serve", "--config", file, "--kv-memory", "64MiB")
    assert (cluster.config.attention_workers, cluster.config.kv_memory_bytes) == (5, 64 << 20)
    assert "attention_workers" in cluster.given and "dense_workers" not in cluster.given
    assert f"{file} changed, and is applied" in done.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("attention-worker: 5", "unknown key 'attention-worker': did you mean attention-workers?"),
        ("attention-workers: 0", "--attention-workers 0: give at least 1"),
        ("model: other", "other values"),
        ("kv-memory: 2 x", "is no size"),
    ],
)
def test_a_file_that_changes_to_nonsense_changes_nothing(run, cluster, write, text, said):
    def refuse(config):
        if config.spec.model == "other":
            raise InvalidRequest("the cluster runs with other values of the model's options")

    file = write("attention-workers: 3")
    cluster.on_wait, cluster.on_reconfigure = lambda _: write(text), refuse
    done = run("serve", "--config", file)
    assert done.code == 0 and f"{file} is not applied: " in done.err and said in done.err
    assert cluster.config.attention_workers == 3 and cluster.config.spec.model == "smollm2"


def test_a_change_that_meets_no_controller_is_applied_later(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("dense-workers: 1")
    watched = WatchedFile(file)
    assert not watched.changed()
    file.write_text("dense-workers: 2")
    assert watched.changed() and not watched.changed()
    watched.forget()
    assert watched.changed() and not watched.changed()
    file.unlink()
    assert not watched.changed()


def test_a_file_gives_what_flags_and_environment_do_not(run, cluster, write, monkeypatch):
    monkeypatch.setenv("FARSHORE_KV_MEMORY", "512MiB")
    monkeypatch.setenv("FARSHORE_SHARD_GRACE", "9")
    monkeypatch.setenv("FARSHORE_TEST_MARK", "no option")
    done = run("serve", "--config", write(FILE), "--shard-grace", "10", "--placement", "offload")
    assert done.code == 0, done.err
    config = cluster.config
    assert (config.attention_workers, config.kv_memory_bytes, config.dashboard) == (4, 512 << 20, True)
    # A flag that equals the default goes before the rest, too.
    assert (config.shard_grace_s, config.placement, config.port) == (10.0, "offload", 50051)
    spec = config.spec
    assert (spec.model, spec.names, spec.max_model_len) == ("org/name", ("one", "two"), 32768)
    assert spec.rope_scaling == {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attention-worker: 4", "unknown key 'attention-worker': did you mean attention-workers?"),
        ("kv-memory: lots", "kv-memory: 'lots' is no size"),
        ("dashboard: maybe", "dashboard: 'maybe' is neither true nor false"),
        ("placement: here", "placement: 'here': use one of offload, local"),
        ("attention-workers: 2000", "--attention-workers 2000: give at most"),
        ("- a\n- b", "must hold options by name"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_named_with_key_and_fix(run, cluster, write, text, message):
    done = run("serve", "--config", write(text))
    assert done.code == 2 and message in done.err, done.err
    assert cluster.config is None


def test_a_wrong_variable_is_named(run, cluster, monkeypatch):
    monkeypatch.setenv("FARSHORE_PORT", "http")
    done = run("serve")
    assert done.code == 2 and "FARSHORE_PORT: " in done.err


def test_a_missing_file(run, cluster):
    done = run("serve", "--config", "/nowhere.yaml")
    assert done.code == 2 and "/nowhere.yaml: can't be read" in done.err


def test_help_names_the_defaults(run):
    text = " ".join(run("serve", "--help").out.split())
    assert "(default: 1GiB)" in text and "(default: 50051)" in text and "--config FILE" in text
