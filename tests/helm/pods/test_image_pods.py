"""The Dockerfile's commands make a root in which the pods of the default values form a cluster that answers.

There is no Docker here, and no registry of images. ``mmdebstrap`` makes the base image of Debian's packages:
the same Debian, and its own patch of the same Python. ARG, ENV, WORKDIR, RUN and COPY do what they do in a
build; what they download comes from where this machine's apt and pip get it.
"""

import json
import os
import re
import shlex
import shutil
import string
import subprocess
import tempfile
from pathlib import Path

import pytest

from .image import Image

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]

REPOSITORY = Path(__file__).parents[3]
BASE_PACKAGES = ("python3", "python3-dev", "python3-venv", "python-is-python3", "ca-certificates")
BASE_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/root",
}
DOWNLOADS = (
    *("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs"),
    *("/etc/pip.conf", "/etc/xdg/pip", "/root/.config/pip", "/root/.pip"),
)
"""Where this machine says how it reaches Debian's and Python's packages."""

BUILD_S = 3000.0
ENTER = """
set -e
root=$1 directory=$2
shift 2
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
while [ "$1" != -- ]; do
    if [ -d "$1" ]; then mkdir -p "$root$1"; else mkdir -p "$(dirname "$root$1")"; touch "$root$1"; fi
    mount --bind "$1" "$root$1"
    shift
done
shift
exec chroot "$root" sh -c 'cd "$0" && exec "$@"' "$directory" "$@"
"""
"""Runs a command in a root, in a mount namespace of its own."""


def instructions():
    """(name, arguments) of each line of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", (REPOSITORY / "Dockerfile").read_text(), flags=re.MULTILINE)
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if line.strip():
            name, _, arguments = line.partition(" ")
            yield name, arguments.strip()


class Stage:
    """A stage of the build: a root, and what its instructions have set. ``given``: the build's arguments."""

    def __init__(self, root, given):
        self.root = root
        self.given = given
        self.environment = dict(BASE_ENVIRONMENT)
        self.arguments = {}
        self.directory = "/"

    def obey(self, name, text, stages):
        if name == "ARG":
            key, _, value = text.partition("=")
            self.arguments[key] = self.given.get(key, value)
        elif name == "ENV":
            self.environment |= dict(each.split("=", 1) for each in shlex.split(self._expanded(text)))
        elif name == "WORKDIR":
            self.directory = text
            (self.root / text.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif name == "RUN":
            self.run("sh", "-c", text)
        elif name == "COPY" and (source := re.fullmatch(r"--from=(\w+) (\S+) \2", text)):
            place = source[2].lstrip("/")
            _copy(stages[source[1]].root / place, self.root / place)
        elif name == "COPY":
            assert text == ". .", text
            self._copy_context(self.root / self.directory.lstrip("/"))
        else:
            assert name in ("LABEL", "USER", "ENTRYPOINT"), name

    def run(self, *command):
        """What the command prints."""
        downloads = [path for path in (*DOWNLOADS, *_local_packages()) if Path(path).exists()]
        variables = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("PIP_", "SSL_CERT", "REQUESTS_CA")) or name.lower().endswith("_proxy")
        }
        enter = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, "sh")
        done = subprocess.run(
            [*enter, self.root, self.directory, *downloads, "--", *command],
            env=variables | self.environment | self.arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BUILD_S,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-6000:]}"
        return done.stdout

    def _expanded(self, text):
        return string.Template(text).substitute(self.arguments | self.environment)

    def _copy_context(self, target):
        """What .dockerignore lets through: what it names, without what its last lines name again."""
        lines = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line[:1] != "#"]
        assert lines[0] == "*"
        unwanted = [line.removeprefix("**/") for line in lines if line.startswith("**/")]
        for name in (line[1:] for line in lines if line.startswith("!")):
            source = REPOSITORY / name
            if source.is_dir():
                shutil.copytree(source, target / name, ignore=shutil.ignore_patterns(*unwanted))
            else:
                shutil.copy2(source, target / name)


def _copy(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "--archive", "--reflink=auto", source, target], check=True, timeout=600)


def _local_packages():
    """Folders of this machine in which pip looks for packages."""
    listed = subprocess.run(["pip", "config", "list"], capture_output=True, text=True, timeout=60).stdout
    words = shlex.split(listed.replace("=", " "))
    # The pages of an index name files beside it.
    indices = {str(Path(word.removeprefix("file://")).parent) for word in words if word.startswith("file:/")}
    return indices | {word for word in words if word.startswith("/") and Path(word).is_dir()}


def _base(folder, suite):
    """A root such as the base image's."""
    apt = Path("/etc/apt")
    sources = [*apt.glob("sources.list"), *apt.glob("sources.list.d/*.list"), *apt.glob("*.d/*.sources")]
    options = [each for each in apt.glob("apt.conf.d/*") if "Acquire::" in each.read_text()]
    command = ["mmdebstrap", "--variant=minbase", f"--include={','.join(BASE_PACKAGES)}"]
    command += [f"--aptopt={each}" for each in options]
    done = subprocess.run(
        [*command, suite, folder, *sources], capture_output=True, text=True, timeout=BUILD_S
    )
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def built():
    """The last stage of the Dockerfile."""
    if os.geteuid() != 0 or shutil.which("mmdebstrap") is None:
        pytest.skip("needs root, and mmdebstrap: install it")
    found = list(instructions())
    arguments = dict(text.split("=", 1) for name, text in found if name == "ARG")
    suite = arguments["PYTHON_IMAGE"].rpartition("-")[2]
    if f"VERSION_CODENAME={suite}\n" not in Path("/etc/os-release").read_text():
        pytest.skip(f"this machine's apt has no packages of Debian {suite}")
    with tempfile.TemporaryDirectory(prefix="farshore-image-", dir="/var/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        _base(folder / "base", suite)
        stages, stage = {}, None
        for name, text in found:
            if name == "FROM":
                _, _, alias = text.partition(" AS ")
                stage = stages[alias] = Stage(folder / f"stage-{len(stages)}", {})
                _copy(folder / "base", stage.root)
            elif stage is not None:
                stage.obey(name, text, stages)
        yield stage


def test_the_root_has_the_program_and_no_compiler(built):
    said = built.run("farshore", "--help")
    assert "farshore generate" in said
    facts = built.run(
        "python",
        "-c",
        "import json, shutil, ray, farshore.models.files.source as s;"
        "print(json.dumps([ray.__version__, shutil.which('g++'), shutil.which('pip'),"
        " str(s.resolve('smollm2').path)]))",
    )
    version, compiler, pip, model = json.loads(facts.splitlines()[-1])
    assert (
        version == dict(text.split("=", 1) for name, text in instructions() if name == "ARG")["RAY_VERSION"]
    )
    assert (compiler, pip) == (None, None)
    assert model.startswith("/opt/farshore/")


def test_the_pods_form_a_cluster_in_it(built, install):
    environment = {name: value for name, value in built.environment.items() if name != "HOME"}
    image = Image(built.root, folders=("usr", "opt/farshore"), env=environment)
    cluster = install(image=image)
    probes = cluster.probes()
    assert all(passed for passed, _ in probes.values()), probes
    assert "Paris" in cluster.helm_test()
