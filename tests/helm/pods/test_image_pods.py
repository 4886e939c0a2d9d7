"""In the root that the Dockerfile's commands make, the rendered pods form a cluster that answers.

There is no Docker here, and no registry of images: see ``dockerfile``.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from .dockerfile import Build
from .image import Image
from .pod_tests import DefaultPods, RedisPods

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def built():
    """The last stage of the Dockerfile."""
    if os.geteuid() != 0 or shutil.which("mmdebstrap") is None:
        pytest.skip("needs root, and mmdebstrap: install it")
    with tempfile.TemporaryDirectory(prefix="farshore-image-", dir="/var/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        build = Build(REPOSITORY, folder)
        if f"VERSION_CODENAME={build.suite}\n" not in Path("/etc/os-release").read_text():
            pytest.skip(f"this machine's apt has no packages of Debian {build.suite}")
        yield build.stage()


@pytest.fixture(scope="module")
def image(built):
    """Instead of this installation."""
    environment = {name: value for name, value in built.environment.items() if name != "HOME"}
    return Image(built.root, folders=("usr", "opt/farshore"), env=environment)


def test_the_root_has_the_program_and_no_compiler(built, defaults):
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
    assert version == defaults["ray"]["version"]
    assert (compiler, pip) == (None, None)
    assert model.startswith("/opt/farshore/")


class TestDefaultPods(DefaultPods):
    pass


class TestRedisPods(RedisPods):
    pass
