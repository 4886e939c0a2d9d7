"""Builds a stage of the Dockerfile in folders, without Docker: its commands, in roots of Debian's packages.

``mmdebstrap`` makes the base image: the same Debian, and its own patch of the same Python. ARG, ENV, WORKDIR,
RUN, COPY and FROM do what they do in a build; LABEL, USER and ENTRYPOINT don't change the root. What the
commands download comes from where this machine's apt and pip get it. Must not know the chart.
"""

import os
import re
import shlex
import shutil
import string
import subprocess
from pathlib import Path

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

COMMAND_S = 3000.0
"""The native modules, compiled for every instruction set on two cores, take a third of it."""

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


def instructions(text):
    """(name, arguments) of each instruction of a Dockerfile."""
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if line.strip():
            name, _, arguments = line.partition(" ")
            yield name, arguments.strip()


class Build:
    """A build of ``context``/Dockerfile in ``folder``. ``arguments``: those before the first FROM."""

    def __init__(self, context, folder):
        self.context = context
        self.folder = folder
        self.arguments = {}
        self._instructions = {}
        """Alias -> (what the stage is made from, its instructions). The last one's alias is empty."""
        self._made = {}
        for name, text in instructions((context / "Dockerfile").read_text()):
            if name == "FROM":
                base, _, alias = text.partition(" AS ")
                added = []
                self._instructions[alias] = string.Template(base).substitute(self.arguments), added
            elif not self._instructions:
                assert name == "ARG", name
                self.arguments |= [text.split("=", 1)]
            else:
                added.append((name, text))

    @property
    def suite(self):
        """The Debian release of the base image."""
        return self.arguments["PYTHON_IMAGE"].rpartition("-")[2]

    def stage(self, alias=""):
        """A stage, made at the first use: others, which the last stage does not need, are not made."""
        if alias not in self._made:
            base, todo = self._instructions[alias]
            made = Stage(self, self.folder / f"stage-{alias}")
            if base in self._instructions:
                _copy(self.stage(base).root, made.root)
                made.environment |= self.stage(base).environment
            else:
                assert base == self.arguments["PYTHON_IMAGE"], base
                _copy(self._base(), made.root)
            self._made[alias] = made
            for name, text in todo:
                made.obey(name, text)
        return self._made[alias]

    def _base(self):
        """A root such as the base image's."""
        folder = self.folder / "base"
        if not folder.exists():
            apt = Path("/etc/apt")
            sources = [
                *apt.glob("sources.list"),
                *apt.glob("sources.list.d/*.list"),
                *apt.glob("*.d/*.sources"),
            ]
            options = [each for each in apt.glob("apt.conf.d/*") if "Acquire::" in each.read_text()]
            command = ["mmdebstrap", "--variant=minbase", f"--include={','.join(BASE_PACKAGES)}"]
            command += [f"--aptopt={each}" for each in options]
            done = subprocess.run(
                [*command, self.suite, folder, *sources], capture_output=True, text=True, timeout=COMMAND_S
            )
            assert done.returncode == 0, done.stderr[-6000:]
        return folder


class Stage:
    """A stage of the build: a root, and what its instructions have set."""

    def __init__(self, build, root):
        self.build = build
        self.root = root
        self.environment = dict(BASE_ENVIRONMENT)
        self.arguments = {}
        self.directory = "/"

    def obey(self, name, text):
        if name == "ARG":
            key, given, value = text.partition("=")
            self.arguments[key] = value if given else self.build.arguments[key]
        elif name == "ENV":
            self.environment |= dict(each.split("=", 1) for each in shlex.split(self._expanded(text)))
        elif name == "WORKDIR":
            self.directory = text
            (self.root / text.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif name == "RUN":
            self.run("sh", "-c", text)
        elif name == "COPY" and (source := re.fullmatch(r"--from=(\w+) (\S+) \2", text)):
            place = source[2].lstrip("/")
            _copy(self.build.stage(source[1]).root / place, self.root / place)
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
            timeout=COMMAND_S,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-6000:]}"
        return done.stdout

    def _expanded(self, text):
        return string.Template(text).substitute(self.arguments | self.environment)

    def _copy_context(self, target):
        """What .dockerignore lets through: what it names, without what its last lines name again."""
        context = self.build.context
        lines = [line for line in (context / ".dockerignore").read_text().splitlines() if line[:1] != "#"]
        assert lines[0] == "*"
        unwanted = [line.removeprefix("**/") for line in lines if line.startswith("**/")]
        for name in (line[1:] for line in lines if line.startswith("!")):
            source = context / name
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
    # A value is quoted, and may name several.
    words = [word for text in shlex.split(listed.replace("=", " ")) for word in text.split()]
    # The pages of an index name files beside it.
    indices = {str(Path(word.removeprefix("file://")).parent) for word in words if word.startswith("file:/")}
    return indices | {word for word in words if word.startswith("/") and Path(word).is_dir()}
