"""``farshore tokenize``, ``detokenize`` and ``models`` against a gateway."""

import io
import json

import pytest

TEXT = "Größe 🌍"


@pytest.fixture
def ask(run, farshore):
    """ask("models", …) -> code, out and err, from the gateway."""
    return lambda *arguments: run(*arguments, "--server", farshore.address)


def test_a_text_and_back(ask, served, tmp_path):
    ids = served.tokenizer.encode(TEXT)
    shown = " ".join(map(str, ids)) + "\n"
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    for done in (ask("tokenize", TEXT), ask("tokenize", f"@{tmp_path / 'text'}")):
        assert (done.code, done.out, done.err) == (0, shown, "")
    assert json.loads(ask("tokenize", TEXT, "--json").out) == {"count": len(ids), "ids": ids}
    assert ask("detokenize", *map(str, ids)).out == f"{TEXT}\n"
    assert json.loads(ask("detokenize", *map(str, ids), "--json").out) == {"text": TEXT}


def test_ids_from_stdin(ask, served, monkeypatch):
    ids = served.tokenizer.encode(TEXT)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(str, ids))))
    assert ask("detokenize", "-").out == f"{TEXT}\n"


def test_a_chat(ask, encode_chat):
    messages = [{"role": "user", "content": "Hi"}]
    done = ask("tokenize", json.dumps(messages), "--chat", "--json")
    assert json.loads(done.out)["ids"] == encode_chat(messages)


def test_blank_texts_are_texts(ask, served):
    assert json.loads(ask("tokenize", " ", "--json").out)["ids"] == served.tokenizer.encode(" ")


def test_special_tokens_can_be_left_out(ask, served):
    done = ask("tokenize", TEXT, "--no-special-tokens", "--json")
    assert json.loads(done.out)["ids"] == served.tokenizer.encode(TEXT, add_special_tokens=False)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("tokenize", "Hi", "--model", "gpt-9"), 1, "'smollm2'"),
        (("tokenize", "Hi", "--chat"), 1, "no JSON"),
        (("tokenize", "[]", "--chat", "--no-special-tokens"), 2, "its template's"),
        (("tokenize", "@/no/such/file"), 1, "can't be read"),
        (("detokenize", "five"), 1, "such as 504 3575"),
        (("detokenize", "-5"), 1, "does not fit"),
        (("detokenize", "5000000"), 1, "5000000"),
        (("detokenize",), 2, "ID"),
        (("models", "gpt-9"), 1, "gpt-9"),
    ],
)
def test_errors(ask, arguments, code, words):
    done = ask(*arguments)
    assert (done.code, done.out) == (code, "")
    assert words in done.err and "Traceback" not in done.err


def test_models(ask, served):
    (listed,) = json.loads(ask("models", "--json").out)["models"]
    assert set(listed) == {"name", "root", "max_positions", "vocabulary"}
    assert (listed["name"], listed["max_positions"]) == ("smollm2", served.config.max_positions)
    for done in (ask("models"), ask("models", "smollm2")):
        header, row = done.out.splitlines()
        assert header.split() == ["NAME", "MODEL", "POSITIONS", "VOCABULARY"]
        assert row.split()[0] == "smollm2" and row.split()[-1] == str(served.config.vocab)
