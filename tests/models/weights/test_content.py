"""The digest of a model's content: what changes it, what does not, and its cache."""

import hashlib
import json
import os
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from farshore.errors import ModelError
from farshore.models.config.load import load_config
from farshore.models.files.source import ModelSource
from farshore.models.weights import load as weights_load
from farshore.models.weights.load import load_model

SINGLE = "model.safetensors"
NORM = "model.norm.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "farshore" / "content"


@pytest.fixture
def folder(tiny):
    return tiny()[1]


def content(folder, dtype=torch.float32, **options):
    return load_model(ModelSource(str(folder), folder, "hf"), dtype=dtype, **options).content


def settled(path):
    """Makes the file old enough for the cache."""
    os.utime(path, (time.time() - 60,) * 2)


def save(tensors, path):
    save_file(tensors, path, metadata={"format": "pt"})


def test_files_and_paths_do_not_matter(folder, tmp_path):
    expected = content(folder)
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / SINGLE)
    weight_map = {name: f"{number % 3}.safetensors" for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save({name: tensors[name] for name in tensors if weight_map[name] == file}, moved / file)
    (moved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert content(moved) == expected
    save({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, moved / SINGLE)
    assert content(moved) == expected


def test_weights_dtype_and_constants_matter(folder):
    seen = [content(folder), content(folder, torch.bfloat16)]
    config = load_config(ModelSource("tiny", folder, "hf"))
    for changes in ({"rms_eps": 1e-4}, {"rope": replace(config.rope, theta=1e5)}, {"max_positions": 99}):
        seen.append(content(folder, config=replace(config, **changes)))
    tensors = load_file(folder / SINGLE)
    tensors[NORM][-1] += 1e-6
    save(tensors, folder / SINGLE)
    seen.append(content(folder))
    save({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, folder / SINGLE)
    seen.append(content(folder))
    assert len(set(seen)) == len(seen)
    assert content(folder, config=replace(config, name="other")) == seen[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ways_of_reading_do_not_matter(demo, monkeypatch, dtype):
    """Kernels take the file's own blocks where they are built; a host without them dequantises."""
    with_kernels = load_model(demo, dtype=dtype, threads=2).content
    monkeypatch.setattr(weights_load, "_native", lambda *_: None)
    assert load_model(demo, dtype=dtype, threads=1).content == with_kernels


def test_cache_has_the_digests_of_tensors(folder, cache):
    settled(folder / SINGLE)
    expected = content(folder)
    (entry,) = cache.iterdir()
    digests = json.loads(entry.read_text())["tensors"]
    tensors = load_file(folder / SINGLE)
    assert digests.keys() == tensors.keys()
    for name, tensor in tensors.items():
        header = json.dumps(["F32", *tensor.shape], separators=(",", ":")).encode()
        assert digests[name] == hashlib.sha256(header + tensor.numpy().tobytes()).hexdigest(), name
    assert content(folder) == expected


def test_cache_is_used_for_an_unchanged_file_only(folder, cache):
    path = folder / SINGLE
    settled(path)
    expected = content(folder)
    (entry,) = cache.iterdir()
    text = entry.read_text()
    changed = json.loads(text)
    changed["tensors"][NORM] = "0" * 64
    entry.write_text(json.dumps(changed))
    assert content(folder) != expected
    os.utime(path, (time.time() - 50,) * 2)
    assert content(folder) == expected
    for damage in ("", "{", "[]", '{"format": 1}', json.dumps(json.loads(text) | {"tensors": {NORM: "00"}})):
        entry.write_text(damage)
        os.utime(path, ns=(0, json.loads(text)["file"][1]))
        assert content(folder) == expected, damage


@pytest.mark.parametrize(("age_ns", "cached"), [(1_999_999_999, False), (2_000_000_000, True)])
def test_recent_file_is_not_cached(folder, cache, monkeypatch, age_ns, cached):
    """It may change again within a tick of the file system's clock."""
    clock = SimpleNamespace(time_ns=lambda: (folder / SINGLE).stat().st_mtime_ns + age_ns)
    monkeypatch.setattr("farshore.models.weights.content.time", clock)
    content(folder)
    assert cache.exists() == cached


def test_unwritable_cache(folder, tmp_path, monkeypatch):
    settled(folder / SINGLE)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    unwritable = content(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert content(folder) == unwritable


def test_no_home(folder, monkeypatch):
    expected = content(folder)
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", no_home)
    assert content(folder) == expected


def test_cache_is_bounded(folder, cache, monkeypatch):
    monkeypatch.setattr("farshore.models.weights.content._MOST_FILES", 2)
    for age_s in (60, 50, 40, 30):
        os.utime(folder / SINGLE, (time.time() - age_s,) * 2)
        content(folder)
    assert len(list(cache.iterdir())) == 2


def test_file_that_changes_while_it_is_read(folder):
    with pytest.raises(ModelError, match=r"model\.safetensors: changed while it was read"):
        content(folder, progress=lambda done, total: os.utime(folder / SINGLE, (done, done)))


def test_file_that_is_replaced_while_it_is_read(folder, cache):
    def swap(done, total):
        if done == 1:
            (folder / "new").write_bytes((folder / SINGLE).read_bytes())
            settled(folder / "new")
            (folder / "new").rename(folder / SINGLE)

    settled(folder / SINGLE)
    with pytest.raises(ModelError, match=r"model\.safetensors: changed while it was read"):
        content(folder, progress=swap)
    assert not cache.exists()
