"""``farshore doctor`` and the extra ``kube``. What it finds: tests/helm/test_doctor.py."""

import subprocess
import sys

WITHOUT = """
import sys
from farshore.client.cli.main import main

assert not [name for name in sys.modules if name.partition(".")[0] == "kubernetes"]
sys.modules["kubernetes"] = None
sys.exit(main(["doctor", "--kube", "--release", "demo"]))
"""


def test_without_the_extra_it_names_the_installation():
    """The command line imports nothing of it before."""
    command = [sys.executable, "-P", "-c", WITHOUT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "farshore: error: doctor --kube needs the package kubernetes: "
        'install it with pip install ".[kube]" in a checkout of farshore\n'
    )


def test_what_to_examine_must_be_said(run):
    assert run("doctor", "--release", "demo").code == 2
    assert run("doctor", "--kube").code == 2
