"""``farshore bench``, with a benchmark that returns a fixed report."""

import json

import pytest

from farshore.benchmarks import catalogue
from farshore.benchmarks.report import Bar, Report, Result
from farshore.benchmarks.timing import Timing
from farshore.errors import InvalidRequest

REPORT = Report(
    {"cpu": "Z80", "rates": {"a": 1.5}, "isa": ()},
    (Result("case", Timing((0.009, *[0.012] * 18, 0.02)), {"gbps": 30.0}),),
    (Bar.at_least("case", 30, 40, "% of bandwidth"), Bar.at_most("call", 2, 10, "µs")),
)


@pytest.fixture
def asked(monkeypatch):
    """The options with which the benchmark ``nothing`` was run, one entry per run."""
    options = []

    def run_nothing(given, progress):
        options.append(given)
        progress("measuring nothing")
        given.so_far(Report({"cpu": "Z80"}))
        if given.only == "fails":
            raise InvalidRequest("it failed")
        return REPORT

    benchmark = catalogue.Benchmark("nothing at all", run_nothing)
    monkeypatch.setattr(catalogue, "BENCHMARKS", {"nothing": benchmark})
    return options


def test_without_a_name_the_benchmarks_are_listed(run):
    done = run("bench")
    assert done.code == 0
    assert {"machine", "kernels"} <= {line.split()[0] for line in done.out.splitlines()}


def test_the_list_as_json(run, asked):
    assert json.loads(run("bench", "--json").out) == {"nothing": "nothing at all"}


def test_an_unknown_name_is_wrong_usage(run, asked):
    done = run("bench", "dance")
    assert done.code == 2 and done.out == ""
    assert "no benchmark 'dance': choose from nothing" in done.err


def test_json_on_stdout_progress_on_stderr(run, asked):
    done = run("bench", "nothing", "--json")
    assert done.code == 0
    assert json.loads(done.out) == json.loads(json.dumps(REPORT.as_dict()))
    assert "measuring nothing" in done.err


def test_the_report_as_text(run, asked):
    done = run("bench", "nothing")
    assert "case: median 12 ms of 20 runs (p10 12 ms, p90 12 ms)" in done.out
    rows = [line.split() for line in done.out.splitlines()]
    assert ["missed", "case", "30", ">=", "40", "%", "of", "bandwidth"] in rows
    assert ["met", "call", "2", "<=", "10", "µs"] in rows
    assert "isa: none" in done.out and "rates: a 1.5" in done.out


def test_what_was_not_measured_as_text(run, asked, monkeypatch):
    empty = Report({}, (Result("case", Timing(())),), (Bar.at_most("call", None, 10, "µs", "nothing ran"),))
    monkeypatch.setitem(globals(), "REPORT", empty)
    done = run("bench", "nothing")
    assert "case: median not measured of 0 runs" in done.out
    rows = [line.split() for line in done.out.splitlines()]
    assert ["missed", "call", "None", "<=", "10", "µs", "nothing", "ran"] in rows


def test_options_reach_the_benchmark(run, asked):
    run("bench", "nothing", "--implementation", "reference", "--threads", "3", "--only", "merge")
    run("bench", "nothing")
    assert asked == [catalogue.Options("reference", 3, "merge"), catalogue.Options(None, None, "")]


def test_out_writes_json_even_if_text_is_printed(run, asked, tmp_path):
    file = tmp_path / "nothing.json"
    done = run("bench", "nothing", "--out", str(file))
    assert done.code == 0 and "BAR" in done.out
    assert set(json.loads(file.read_text())) == {"machine", "results", "bars"}


def test_out_keeps_what_was_measured_before_a_failure(run, asked, tmp_path):
    file = tmp_path / "nothing.json"
    assert run("bench", "nothing", "--only", "fails", "--out", str(file)).code == 1
    assert json.loads(file.read_text()) == {"machine": {"cpu": "Z80"}, "results": [], "bars": []}


def test_a_missing_folder_is_refused_before_measuring(run, asked, tmp_path):
    done = run("bench", "nothing", "--out", str(tmp_path / "nowhere" / "x.json"))
    assert done.code == 1 and not asked
    assert "does not exist: create it" in done.err


def test_the_report_is_printed_even_if_the_file_cannot_be_written(run, asked, tmp_path):
    done = run("bench", "nothing", "--json", "--out", str(tmp_path))
    assert done.code == 1
    assert "can't be written" in done.err and json.loads(done.out)["bars"]
