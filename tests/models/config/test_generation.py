"""Recommended sampling is read from each of its places; what can't work is refused with file, key and fix."""

import json

import gguf
import pytest

from farshore.errors import ModelError
from farshore.model_spec import ModelSpec
from farshore.models.config.generation import GenerationDefaults, load_generation
from farshore.models.files.source import ModelSource, pinned

VOCAB = 100
LLAMA3 = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [7, 9], "bos_token_id": 1}


@pytest.fixture
def load(tmp_path):
    """load(object, generation_config=…) -> the defaults of a model whose folder has this
    generation_config.json; None: it has none."""

    def read(given, *, generation_config="auto"):
        if given is not None:
            text = given if isinstance(given, str) else json.dumps(given)
            (tmp_path / "generation_config.json").write_text(text)
        source = ModelSource("org/m", tmp_path, "hf")
        return load_generation(ModelSpec(generation_config=generation_config), source, vocab=VOCAB)

    return read


def test_the_models_own_file(load):
    assert load(LLAMA3) == GenerationDefaults(temperature=0.6, top_p=0.9)
    everything = {"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05, "max_new_tokens": 2048}
    expected = dict(top_k=20, min_p=0.05, repetition_penalty=1.05, max_tokens=2048)
    assert load(everything) == GenerationDefaults(**expected)
    assert load({"temperature": 0, "top_k": -1, "top_p": None}) == GenerationDefaults(
        temperature=0.0, top_k=0
    )


def test_a_model_without_the_file_and_an_operator_who_wants_none(load):
    assert load(None) == GenerationDefaults()
    assert load(LLAMA3, generation_config="none") == GenerationDefaults()
    assert load({"top_p": "high"}, generation_config="none") == GenerationDefaults()


def test_another_file_or_folder_goes_before_the_models(load, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "generation_config.json").write_text(json.dumps(LLAMA3 | {"top_k": 5}))
    for path in (other, other / "generation_config.json"):
        found = load({"temperature": 1.5}, generation_config=str(path))
        assert found == GenerationDefaults(temperature=0.6, top_p=0.9, top_k=5, eos_token_ids=(7, 9))


def test_a_path_means_the_same_in_every_process(tmp_path, monkeypatch, demo):
    monkeypatch.chdir(tmp_path)
    assert pinned(ModelSpec(generation_config="g.json")).generation_config == str(tmp_path / "g.json")
    assert pinned(ModelSpec(generation_config="none")).generation_config == "none"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": 3}, "temperature must be a number from 0 .greedy. to 2, not 3"),
        ({"temperature": 1e-9}, "temperature must be 0 .greedy., or 1e-06 to 2"),
        ({"temperature": "hot"}, "temperature must be .* not 'hot'"),
        ({"temperature": True}, "temperature must be .* not True"),
        ({"top_p": 0}, "top_p must be a number above 0, up to 1"),
        ({"top_p": float("nan")}, "top_p must be"),
        ({"min_p": 1.5}, "min_p must be"),
        ({"top_k": 2.5}, "top_k must be a whole number"),
        ({"top_k": -2}, "top_k must be a whole number"),
        ({"repetition_penalty": 0}, "repetition_penalty must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number above 0"),
    ],
    ids=str,
)
def test_a_value_that_cannot_work_names_key_file_and_fix(load, given, words):
    with pytest.raises(ModelError, match=rf"generation_config\.json: {words}.*--generation-config none"):
        load(given)


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_damaged_file_is_named(load, text):
    with pytest.raises(ModelError, match=r"generation_config\.json: .*JSON"):
        load(text)


def test_a_file_that_is_missing_names_the_option(load, tmp_path):
    with pytest.raises(ModelError, match=r"--generation-config .*none\.json: can't be read"):
        load(LLAMA3, generation_config=str(tmp_path / "none.json"))


def test_gguf_metadata_of_llama_cpp(tmp_path, demo):
    """The converter of llama.cpp writes these keys from generation_config.json."""

    def read(**metadata):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        for key, value in metadata.items():
            add = writer.add_int32 if isinstance(value, int) else writer.add_float32
            add(f"general.sampling.{key}", value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        source = ModelSource("m.gguf", tmp_path / "m.gguf", "gguf")
        return load_generation(ModelSpec(), source, vocab=VOCAB)

    found = read(temp=0.75, top_k=20, top_p=0.5, min_p=0.25, penalty_repeat=1.25)
    expected = dict(temperature=0.75, top_k=20, top_p=0.5, min_p=0.25, repetition_penalty=1.25)
    assert found == GenerationDefaults(**expected)
    assert read(penalty_last_n=64) == GenerationDefaults()
    with pytest.raises(ModelError, match=r"m\.gguf: general\.sampling\.temp must be"):
        read(temp=9.0)
    assert load_generation(ModelSpec(), demo, vocab=VOCAB) == GenerationDefaults()
