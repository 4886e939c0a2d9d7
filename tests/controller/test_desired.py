"""The desired numbers of workers: what scale changes survives a restart of the controller."""

import pytest

from farshore.controller.desired import Desired
from farshore.errors import InvalidRequest

FIRST = {"dense": 1, "attention": 2}


def desired(folder, *, keep):
    return Desired(FIRST, folder / "desired.json", placement="offload", keep=keep)


def test_scale_changes_the_named_numbers_and_is_kept(tmp_path):
    made = desired(tmp_path, keep=False)
    assert made.scale({"attention": 5}) == {"dense": 1, "attention": 5} == made.counts()
    assert desired(tmp_path, keep=True).counts() == {"dense": 1, "attention": 5}
    assert desired(tmp_path, keep=False).counts() == FIRST


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": 0}, "at least 1"),
        ({"attention": 2000}, "at most"),
        ({"dense": 0}, "at least 1"),
        ({"dense": 2000}, "at most"),
    ],
)
def test_numbers_that_cannot_work_are_refused_and_change_nothing(tmp_path, changes, message):
    made = desired(tmp_path, keep=False)
    with pytest.raises(InvalidRequest, match=message):
        made.scale(changes)
    assert made.counts() == FIRST == desired(tmp_path, keep=True).counts()
