"""The options of ``farshore serve`` from flags, the environment and a file, in this order."""

import pytest


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
