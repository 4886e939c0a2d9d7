"""Hub ids, by the hub's real client against a stand-in hub (see conftest.py): which files are fetched, what
the cache is good for, and the error of each failure."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from farshore.errors import ModelError
from farshore.models.files import hub as hub_module
from farshore.models.files.source import resolve, resolve_tokenizer

INDEX = json.dumps(
    {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
)
SMALL = {
    name: f'{{"name": "{name}"}}'  # The cache holds equal contents once.
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
    )
}
OTHERS = {
    "README.md": "",
    "pytorch_model.bin": b"0" * 1000,
    "consolidated.safetensors": b"1" * 1000,
    "original/model.safetensors": b"2" * 1000,
    "onnx/tokenizer.json": "{}",
    "optimizer.pt": b"3" * 1000,
}
PLAIN = {**SMALL, **OTHERS, "model.safetensors": b"w" * 100}
GGUFS = {
    "tiny-Q4_K_M.gguf": b"GGUF1",
    "tiny-IQ4_K_M.gguf": b"GGUF2",
    "tiny-Q4_K.gguf": b"GGUF3",
    "mmproj-Q8_0.gguf": b"GGUF4",
    "Q8_0/tiny-Q8_0-00001-of-00002.gguf": b"GGUF5",
    "Q8_0/tiny-Q8_0-00002-of-00002.gguf": b"GGUF6",
    "README.md": "",
}


def refused(name, **options):
    with pytest.raises(ModelError) as caught:
        resolve(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def go_offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_only_the_files_needed_are_fetched_and_only_once(hub):
    hub.add("org/tiny", PLAIN)
    said = []
    source = resolve("org/tiny", progress=said.append)
    assert (source.name, source.kind, source.commit) == ("org/tiny", "hf", "a" * 40)
    assert hub.downloads() == [*sorted(SMALL), "model.safetensors"]
    assert (source.path / "model.safetensors").read_bytes() == b"w" * 100
    assert said[0].startswith("downloading org/tiny: ") and said[-1].endswith(" of 0.00 GB")
    said.clear()
    assert resolve("org/tiny", progress=said.append) == source and said == []
    assert hub.downloads() == [*sorted(SMALL), "model.safetensors"]


def test_a_single_file_of_weights_wins_over_an_index_as_in_transformers(hub):
    hub.add(
        "org/tiny", {**PLAIN, "model.safetensors.index.json": INDEX, "model-00001-of-00002.safetensors": b"x"}
    )
    resolve("org/tiny")
    assert hub.downloads() == [*sorted(SMALL), "model.safetensors"]


def test_an_index_brings_the_files_that_it_names(hub):
    shards = {f"model-0000{n}-of-00002.safetensors": bytes([n]) * 50 for n in (1, 2)}
    stray = {"model-00003-of-00003.safetensors": b"x"}
    hub.add("org/tiny", {**SMALL, **OTHERS, **shards, **stray, "model.safetensors.index.json": INDEX})
    source = resolve("org/tiny")
    assert hub.downloads() == [*sorted([*SMALL, "model.safetensors.index.json"]), *sorted(shards)]
    assert all((source.path / name).is_file() for name in shards)


@pytest.mark.parametrize("weight_map", ["[]", '{"a": "../x.safetensors"}', '{"a": 3}', "3"])
def test_a_damaged_index_is_refused(hub, weight_map):
    hub.add("org/tiny", {**SMALL, "model.safetensors.index.json": f'{{"weight_map": {weight_map}}}'})
    assert "index" in refused("org/tiny")


def test_an_index_of_files_that_are_not_there(hub):
    hub.add("org/tiny", {**SMALL, "model.safetensors.index.json": INDEX})
    assert "lacks model-00001-of-00002.safetensors" in refused("org/tiny")


@pytest.mark.parametrize(
    ("name", "first", "fetched"),
    [
        ("org/q:Q4_K_M", "tiny-Q4_K_M.gguf", ["tiny-Q4_K_M.gguf"]),
        ("org/q:q4_k", "tiny-Q4_K.gguf", ["tiny-Q4_K.gguf"]),
        ("org/q:tiny-IQ4_K_M.gguf", "tiny-IQ4_K_M.gguf", ["tiny-IQ4_K_M.gguf"]),
        (
            "org/q:Q8_0",
            "Q8_0/tiny-Q8_0-00001-of-00002.gguf",
            ["Q8_0/tiny-Q8_0-00001-of-00002.gguf", "Q8_0/tiny-Q8_0-00002-of-00002.gguf"],
        ),
    ],
)
def test_a_gguf_model_is_named_after_the_colon(hub, name, first, fetched):
    hub.add("org/q", GGUFS)
    source = resolve(name)
    assert (source.kind, source.commit, source.name) == ("gguf", "a" * 40, name)
    # The link's name, not that of the blob it points to: parts are found by their names.
    assert source.path.as_posix().endswith(f"/snapshots/{'a' * 40}/{first}")
    assert hub.downloads() == fetched


def test_gguf_models_that_are_not_named_clearly(hub):
    hub.add("org/q", GGUFS)
    assert "several GGUF models: Q8_0/tiny-Q8_0-00001-of-00002.gguf, tiny-IQ4_K_M.gguf" in refused("org/q")
    assert "no GGUF model has 'Q5_0'" in refused("org/q:Q5_0")
    assert "is in the names of several GGUF models" in refused("org/q:tiny")
    hub.add("org/one", {"tiny-Q4_0.gguf": b"GGUF", "config.json": "{}"})
    assert resolve("org/one").kind == "gguf"
    hub.add("org/none", PLAIN)
    assert "no .gguf file" in refused("org/none:Q4_0")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": "{}", "pytorch_model.bin": b"0"}, r"only weights as \*.bin"),
        (
            {"adapter_config.json": "{}", "adapter_model.safetensors": b"0", "config.json": "{}"},
            "LoRA adapter",
        ),
        ({"README.md": ""}, "no config.json"),
    ],
)
def test_a_repository_without_a_model(hub, files, expected):
    hub.add("org/tiny", files)
    with pytest.raises(ModelError, match=expected):
        resolve("org/tiny")


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub):
    hub.add("org/tiny", PLAIN)
    assert resolve("org/tiny", revision="v1").commit == "b" * 40
    assert resolve("org/tiny").commit == "a" * 40
    hub.requests.clear()
    assert resolve("org/tiny", revision="b" * 40).commit == "b" * 40
    # A commit never changes: what the cache holds needs no hub.
    assert hub.requests == []
    assert "has no revision 'v9': --revision takes a branch" in refused("org/tiny", revision="v9")


def test_a_tokenizer_without_the_weights(hub):
    hub.add("org/tiny", PLAIN)
    source = resolve_tokenizer("org/tiny")
    assert source.kind == "hf" and (source.path / "tokenizer.json").is_file()
    assert hub.downloads() == sorted({*SMALL} - {"generation_config.json"})
    hub.add("org/none", {"config.json": "{}", "model.safetensors": b"w"})
    with pytest.raises(ModelError, match=r"--tokenizer org/none: has no tokenizer.json or tokenizer.model"):
        resolve_tokenizer("org/none")


def test_a_gated_model_says_what_to_accept_and_then_loads(hub, monkeypatch):
    hub.add("org/gated", PLAIN, readers={"hf_good"})
    text = refused("org/gated")
    assert f"accept its licence at {hub.url}/org/gated" in text
    assert "HF_TOKEN" in text and "hf auth login" in text
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "use a token of that account" in refused("org/gated")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert resolve("org/gated").commit == "a" * 40


def test_a_private_or_mistyped_model(hub, monkeypatch):
    hub.add("org/private", PLAIN, owners={"hf_good"})
    for name in ("org/private", "org/mistyped"):
        text = refused(name)
        assert (
            f"neither a local directory nor a model at {hub.url}: check the id" in text and "HF_TOKEN" in text
        )
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    assert "your token may not read it" in refused("org/private")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert resolve("org/private").kind == "hf"
    assert "is not a valid id" in refused("org/bad--name")


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (503, "has failed .503.; try again later"),
        (429, "too many requests"),
        (403, "may not read it"),
        (418, "check the id"),
    ],
)
def test_a_hub_that_refuses(hub, status, expected):
    hub.status = status
    with pytest.raises(ModelError, match=expected):
        resolve("org/tiny")


def test_offline(hub, monkeypatch):
    hub.add("org/tiny", PLAIN)
    go_offline(monkeypatch)
    assert "is not in the hub's cache, and HF_HUB_OFFLINE forbids downloads: unset it" in refused("org/tiny")


def test_offline_with_a_whole_and_a_partial_cache(hub, monkeypatch):
    shards = {f"model-0000{n}-of-00002.safetensors": bytes([n]) * 50 for n in (1, 2)}
    hub.add("org/tiny", {**SMALL, **shards, "model.safetensors.index.json": INDEX})
    source = resolve("org/tiny")
    hub.requests.clear()
    go_offline(monkeypatch)
    said = []
    assert resolve("org/tiny", progress=said.append) == source
    assert said == ["org/tiny: HF_HUB_OFFLINE is set; using commit aaaaaaa from the cache"]
    assert hub.requests == []
    (source.path / "model-00002-of-00002.safetensors").unlink()
    text = refused("org/tiny")
    assert "in the hub's cache without model-00002-of-00002.safetensors, and HF_HUB_OFFLINE" in text
    assert "local directory" in text
    assert "not in the hub's cache" in refused("org/tiny", revision="v1")


def test_an_unreachable_hub_and_one_that_failed_leave_the_cache(hub, monkeypatch):
    hub.add("org/tiny", PLAIN)
    source = resolve("org/tiny")
    hub.status = 500
    assert resolve("org/tiny") == source
    hub.status = None
    hub.server_close()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve("org/tiny") == source
    text = refused("org/other")
    assert "http://127.0.0.1:9 can't be reached" in text and "check the network" in text
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "check HF_ENDPOINT" in refused("org/other")


def test_a_full_disk_is_told_before_and_while_downloading(hub, monkeypatch):
    hub.add("org/tiny", PLAIN)
    usage = shutil.disk_usage(os.curdir)._replace(free=10)
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda path: usage)
    text = refused("org/tiny")
    assert "has no room" in text and "HF_HOME" in text and hub.downloads() == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "has no room"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache/x"), "can't be written to the cache"),
        (OSError("Consistency check failed"), "broke off .OSError: Consistency check failed."),
    ],
)
def test_an_error_while_a_file_is_written(hub, monkeypatch, error, expected):
    def fail(*_, **__):
        raise error

    hub.add("org/tiny", PLAIN)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    with pytest.raises(ModelError, match=expected):
        resolve("org/tiny")


def test_a_download_that_breaks_off_and_is_tried_again(hub, monkeypatch):
    # The client waits a second before each of its retries.
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))
    hub.add("org/tiny", PLAIN)
    hub.breaks_off = True
    assert f"{hub.url} can't be reached or broke off" in refused("org/tiny")
    hub.breaks_off = False
    hub.requests.clear()
    assert (resolve("org/tiny").path / "model.safetensors").read_bytes() == PLAIN["model.safetensors"]
    assert hub.downloads() == ["model.safetensors"]


FETCH = """
import sys
from farshore.models.files.source import resolve
print(resolve("org/tiny", progress=lambda words: print(words, file=sys.stderr)).path)
"""


def test_two_processes_share_the_cache_and_print_nothing_of_their_own(hub):
    """By the environment, as users set it. The weights are held back until both processes asked for them."""
    hub.add("org/tiny", PLAIN)
    both = threading.Barrier(2)

    def hold(method, path):
        if method == "HEAD" and path.endswith("/model.safetensors") and "/resolve/" in path:
            both.wait(60)

    hub.on_request = hold
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(hub.cache), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-P", "-c", FETCH]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen(command, env=environment, text=True, **pipes) for _ in "ab"]
    ended = [process.communicate(timeout=60) for process in started]
    assert len({out for out, _ in ended}) == 1 and [process.returncode for process in started] == [0, 0], (
        ended
    )
    assert all(line.startswith("downloading org/tiny: ") for _, err in ended for line in err.splitlines())
    assert hub.downloads().count("model.safetensors") == 1
