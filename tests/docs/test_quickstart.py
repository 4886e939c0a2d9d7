"""What docs/quickstart.md tells to type works, against a gateway of this process."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from farshore.client.cli.main import main
from farshore.client.cli.serve import HTTP_PORT

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "quickstart.md").read_text(encoding="utf-8")
ANSWER = " Paris"


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def farshore(harness, loop_thread, served):
    with harness.gateway(loop_thread, served, http="127.0.0.1:0") as made:
        made.engine.auto = served.tokenizer.encode(ANSWER)
        yield made


def test_the_commands(farshore, capsys):
    asked = [line for block in blocks("") for line in block.splitlines() if line.startswith("farshore ")]
    for line in asked:
        _, command, *arguments = shlex.split(line)
        if command in ("generate", "status"):
            assert main([command, *arguments, "--server", farshore.address]) == 0
    assert capsys.readouterr().out.count(ANSWER + "\n") == 2
    assert {line.split()[1] for line in asked} == {"serve", "generate", "chat", "status"}


def test_the_program(farshore):
    (program,) = blocks("python")
    script = program.replace("127.0.0.1:50051", farshore.address)
    command = [sys.executable, "-P", "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, ANSWER, "")


def test_the_call_of_openais_api(farshore):
    (line,) = blocks("sh")
    _, url, _, header, _, body = shlex.split(line.replace("\\\n", " "))
    default = f"http://127.0.0.1:{HTTP_PORT}"
    assert url.startswith(default + "/")
    name, _, value = header.partition(": ")
    url = url.replace(default, f"http://{farshore.gateway.http_address}")
    answer = httpx2.post(url, content=body.encode(), headers={name: value}).json()
    assert answer["choices"][0]["message"]["content"] == ANSWER
    assert json.loads(body)["model"] == "smollm2"


def test_the_pages_that_it_names_exist():
    named = set(re.findall(r"\]\(([a-z-]+\.md)\)", PAGE))
    assert len(named) > 8 and all((DOCS / name).is_file() for name in named)
