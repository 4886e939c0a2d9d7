"""The processes that measure the sections of the GPU benchmark: what one does costs only its section."""

import json
import signal
import subprocess
import sys

import pytest
import torch

from farshore.benchmarks.gpu import benchmark, process
from farshore.benchmarks.gpu.process import Limits
from farshore.benchmarks.report import Bar, Result
from farshore.benchmarks.timing import Timing

SCRIPT = """
import json, os, signal, sys
for name in json.loads(sys.argv[1]):
    print(json.dumps({"section": name}), flush=True)
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "ends":
        sys.exit(3)
    if name == "hangs":
        signal.pause()
    print(json.dumps({"progress": f"making {name}"}), flush=True)
    result = {"name": name, "timing": {"samples_s": [1.0, 2.0]}, "figures": {"pid": os.getpid()}}
    bar = {"name": name, "value": 1, "bound": 2, "unit": "x", "sense": "<=", "note": ""}
    print(json.dumps({"results": [result], "bars": [bar], "machine": {name: True}}), flush=True)
"""
"""Measures as ``sections`` does, except what its names say."""
PATIENT = Limits(section_s=120.0, total_s=240.0)


def measured(*names, limits=PATIENT):
    """The sections, and the progress that was shown."""
    shown = []

    def command(left):
        return [sys.executable, "-c", SCRIPT, json.dumps(left)]

    return list(process.sections(names, command, limits=limits, progress=shown.append)), shown


def test_sections_that_pass_share_a_process():
    (first, second), shown = measured("a", "b")
    pid = first.results[0].figures["pid"]
    assert first.results == [Result("a", Timing((1.0, 2.0)), {"pid": pid})]
    assert first.bars == [Bar.at_most("a", 1, 2, "x")] and first.machine == {"a": True}
    assert second.results[0].figures["pid"] == pid
    assert shown == ["a", "making a", "b", "making b"]


def test_a_new_process_measures_what_follows_one_that_ended():
    sections, _ = measured("a", "killed", "b", "ends", "c")
    assert [bar.name for section in sections for bar in section.bars] == ["a", "killed", "b", "ends", "c"]
    assert [bar.met for section in sections for bar in section.bars] == [True, False, True, False, True]
    assert sections[1].bars[0].note == f"its process ended with {-signal.SIGKILL}"
    assert sections[3].bars[0].note == "its process ended with 3"
    assert len({section.results[0].figures["pid"] for section in sections if section.results}) == 3


def test_a_section_that_hangs_is_ended_and_the_others_are_measured():
    sections, _ = measured("hangs", "a", limits=Limits(section_s=10.0, total_s=240.0))
    assert [bar.met for section in sections for bar in section.bars] == [False, True]
    assert sections[0].bars[0].note.startswith("took more than 1")


def test_nothing_begins_when_the_time_is_over():
    sections, shown = measured("a", "b", limits=Limits(section_s=120.0, total_s=0.0))
    assert shown == []
    assert [bar.note for section in sections for bar in section.bars] == ["0 s had passed"] * 2


def test_the_report_grows_section_by_section(monkeypatch):
    """``so_far`` gets each state of it; the last is the result."""
    made = [
        process.Section([Result(name, Timing((1.0,)))], [Bar.at_most(name, 1, 2, "x")], {name: 1})
        for name in "ab"
    ]
    asked = []

    def sections(names, command, **rest):
        asked.append((names, command(names)))
        return iter(made)

    monkeypatch.setattr(process, "sections", sections)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    facts = benchmark.Facts("cpu", "x86", 1, None, 1, (), "3", "2", 1, 0.0)
    seen = []
    report = benchmark.run(facts, only="steps", progress=lambda _: None, so_far=seen.append)
    assert [[result.name for result in partial.results] for partial in seen] == [["a"], ["a", "b"]]
    assert [set(partial.machine) & {"a", "b", "cpu"} for partial in seen] == [{"cpu", "a"}, {"cpu", "a", "b"}]
    assert seen[-1] == report
    ((names, command),) = asked
    assert names == ["steps", "steps without graphs"] and json.loads(command[-1]) == names


@pytest.mark.parametrize("stuck", ["signal.pause()", "while True: pass"])
def test_a_process_ends_with_its_input(stuck):
    script = (
        "import signal\nfrom farshore.benchmarks.gpu.process import end_with_input\n"
        f"end_with_input()\nprint('ready', flush=True)\n{stuck}\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-P", "-c", script], stdin=pipe, stdout=pipe) as child:
        assert child.stdout.readline() == b"ready\n"
        child.stdin.close()
        assert child.wait(60) == 1
