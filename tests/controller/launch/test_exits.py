"""How a process ended, in words: from exit codes, and from Ray's messages about dead actors."""

import pytest

from farshore.controller.launch.exits import NOT_STARTED, actor_end_in_words, exit_in_words

RAISED = r"""pid: 7 creation_task_failure_context {
  formatted_exception_string: "Traceback:\n  File \"x.py\", line 11, in __init__\n    raise Error(\"...\")\n\
farshore.errors.InvalidRequest: the token file /x can\'t be read: run `chmod 600 /x`\n\n\nDuring handling"
}""".replace("\\\n", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RAISED, f"(process 7) {NOT_STARTED}the token file /x can't be read: run `chmod 600 /x`"),
        ("farshore.errors.PortInUse: taken\nmore", f"{NOT_STARTED}taken"),
        (
            "pid: 9 connection error code 2. End of file",
            "(process 9) was killed, ran out of memory or crashed",
        ),
        ("pid: 9 Worker exit detail: it left. More", "(process 9) ended: it left"),
        ("", "ended"),
    ],
)
def test_an_actors_end(text, expected):
    assert actor_end_in_words(Exception(text)) == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0, "ended with code 0"),
        (3, "ended with code 3"),
        (-9, "was killed by SIGKILL"),
        (-200, "was killed by signal 200"),
    ],
)
def test_an_exit_code(code, expected):
    assert exit_in_words(code) == expected
