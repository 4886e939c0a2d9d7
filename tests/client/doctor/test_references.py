"""Which passwords of Redis reach Ray: the shell itself is asked."""

import string
import subprocess

from farshore.client.doctor.references import is_usable


def test_passwords_that_a_shell_keeps_whole_are_usable():
    """KubeRay's command line has the variable without quotes."""
    command = ["bash", "-c", "printf '%s\\0' --redis-password=$REDIS_PASSWORD"]
    for each in string.punctuation + string.whitespace[:3]:
        environment = {"PATH": "/usr/bin:/bin", "REDIS_PASSWORD": f"a{each}b\n"}
        given = subprocess.check_output(command, env=environment, timeout=60).split(b"\0")[:-1]
        whole = given == [f"--redis-password=a{each}b".encode()]
        assert is_usable(environment["REDIS_PASSWORD"].encode(), bundled=False) == whole, each


def test_the_charts_redis_reads_quotes_as_the_end_of_a_word():
    assert [each for each in "'\"\\#$" if not is_usable(f"a{each}b".encode(), bundled=True)] == ["'", '"']
