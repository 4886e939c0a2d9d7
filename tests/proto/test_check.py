"""buf's rules hold, and a change that breaks a client of the public protocol is found."""

import importlib.util
import shutil
from pathlib import Path

import pytest

PROTO = Path(__file__).resolve().parents[2] / "proto"


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check", PROTO / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def edited(tmp_path):
    """A function that copies the protocol with one text replaced, and returns the copy's folder."""

    def copy(file, old, new):
        for path in PROTO.glob("*.proto"):
            shutil.copy(path, tmp_path)
        text = (tmp_path / file).read_text()
        assert old in text
        (tmp_path / file).write_text(text.replace(old, new, 1))
        return tmp_path

    return copy


def test_the_protocol_passes(check):
    assert check.lint() == ""
    assert check.breaking() == ""


@pytest.mark.parametrize(
    ("file", "old", "new", "rule"),
    [
        ("inference.proto", "message CancelResponse {}", "message CancelReply {}", "CancelResponse"),
        ("inference.proto", "uint32 prompt_tokens = 2;", "", "prompt_tokens"),
        ("inference.proto", "uint32 prompt_tokens = 2;", "uint32 prompt_tokens = 3;", "prompt_tokens"),
        ("admin.proto", "uint64 since = 1;", "string since = 1;", "since"),
    ],
)
def test_a_break_is_found(check, edited, tmp_path, file, old, new, rule):
    folder = edited(file, old, new)
    baseline = tmp_path / "baseline.binpb"
    check.describe(baseline, *check.PUBLIC, comments=False)
    if "CancelReply" in new:
        text = (folder / file).read_text().replace("returns (CancelResponse)", "returns (CancelReply)")
        (folder / file).write_text(text)
    found = check.breaking(folder, baseline=baseline)
    assert rule in found and file in found, found


def test_a_new_field_is_no_break(check, edited, tmp_path):
    folder = edited(
        "inference.proto", "message CancelResponse {}", "message CancelResponse { bool ended = 1; }"
    )
    baseline = tmp_path / "baseline.binpb"
    check.describe(baseline, *check.PUBLIC, comments=False)
    assert check.breaking(folder, baseline=baseline) == ""


def test_the_wire_inside_a_cluster_is_not_compared(check, edited):
    folder = edited("cluster.proto", "uint64 since = 2;", "string since = 2;")
    assert check.breaking(folder) == ""


@pytest.mark.parametrize(
    ("name", "rule"), [("NONE", "should be prefixed"), ("FINISH_REASON_NONE", "should be suffixed")]
)
def test_lint_holds_the_rules_of_enums(check, edited, name, rule):
    folder = edited("inference.proto", "FINISH_REASON_UNSPECIFIED = 0", f"{name} = 0")
    assert rule in check.lint(folder)
