"""What `farshore serve` shows while it waits for workers."""

import pytest

from farshore.controller.config import ClusterConfig
from farshore.controller.driver.start_words import tell
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import WorkerRecord


def record(state, progress=""):
    return WorkerRecord(
        worker=WorkerId("dense-0-a"),
        kind="dense",
        slot="dense-0",
        address="",
        host="",
        process_id=1,
        state=state,
        progress=progress,
    )


@pytest.mark.parametrize(
    ("dense", "lacking", "expected"),
    [
        ([], None, "starting 2 attention workers"),
        ([], "no node declares 'attention'", "waiting for room: no node declares 'attention'"),
        ([record("loading", "3 of 9 tensors")], None, "loading smollm2: 3 of 9 tensors"),
        ([record("serving")], None, "connecting 2 attention workers"),
    ],
)
def test_what_is_waited_for_is_told_once(dense, lacking, expected):
    said = []
    told = tell(said.append, "", ClusterConfig(), dense, lacking, placed=bool(dense))
    assert tell(said.append, told, ClusterConfig(), dense, lacking, placed=bool(dense)) == expected
    assert said == [expected]
