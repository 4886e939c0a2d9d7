"""The desired state: what scale and drain change survives a restart, and what is configured anew wins."""

import pytest

from farshore.controller.desired import Desired, StateFile
from farshore.errors import InvalidRequest
from farshore.ids import WorkerId

FIRST = {"dense": 1, "attention": 2}
WORKER = WorkerId("attention-1-aa")


@pytest.fixture
def file(tmp_path):
    return StateFile(tmp_path / "desired.json")


@pytest.fixture
def desired(file):
    """desired(configured, controller=…, restarted=…, given=…): made from the state that is stored."""

    def make(configured=FIRST, **options):
        options = {"controller": "first", "restarted": False} | options
        return Desired(configured, load=file.load, store=file.store, placement="offload", **options)

    return make


def test_scale_changes_the_named_numbers_and_survives_a_restart(desired):
    made = desired()
    assert made.scale({"attention": 5}) == {"dense": 1, "attention": 5} == made.counts()
    assert desired(restarted=True).counts() == {"dense": 1, "attention": 5}


def test_the_last_scale_goes_before_what_was_configured_already(desired):
    desired().scale({"attention": 5})
    assert desired().counts()["attention"] == 5


def test_a_changed_configuration_goes_before_the_last_scale(desired):
    desired().scale({"attention": 5})
    changed = FIRST | {"attention": 3}
    assert desired(changed).counts()["attention"] == 3
    # From now on it is what was configured last.
    made = desired(changed)
    made.scale({"attention": 4})
    assert desired(changed).counts()["attention"] == 4
    # A restarted controller still has the first configuration.
    assert desired(restarted=True).counts()["attention"] == 4


def test_a_number_that_no_operator_chose_says_nothing(desired):
    desired(FIRST | {"attention": 7})
    assert desired(FIRST, given=["dense"]).counts()["attention"] == 7
    assert desired(FIRST, given=["attention"]).counts()["attention"] == 2


def test_a_second_driver_configures_a_running_controller(desired):
    made = desired()
    made.scale({"attention": 5})
    assert made.configure({"attention": 2})["attention"] == 5
    assert made.configure({"attention": 3})["attention"] == 3
    with pytest.raises(InvalidRequest, match="at least 1"):
        made.configure({"attention": 0})
    assert desired(restarted=True).counts()["attention"] == 3


def test_drain_marks_are_durable_and_end_with_the_worker(desired):
    made = desired()
    made.drain(WORKER, 5.0)
    made.drain(WorkerId("dense-0-bb"), None)
    assert desired(restarted=True).drains() == {WORKER: 5.0, "dense-0-bb": None}
    assert desired().drains() == made.drains()
    made.forget_drains([WORKER, "attention-9-zz"])
    assert desired(restarted=True).drains() == made.drains() == {"dense-0-bb": None}


def test_a_drain_goes_on_over_restarts(desired):
    now_s = 1000.0
    made = desired(clock=lambda: now_s)
    made.drain(WORKER, 60.0)
    now_s += 10.0
    made.drain(WORKER, 30.0)
    made.drain(WorkerId("dense-0-bb"), None)
    now_s += 5.0
    assert made.drained_s() == {WORKER: 15.0, "dense-0-bb": 5.0}
    assert desired(restarted=True, clock=lambda: now_s + 5.0).drained_s() == {
        WORKER: 20.0,
        "dense-0-bb": 10.0,
    }
    made.forget_drains([WORKER])
    assert desired(clock=lambda: now_s).drained_s() == {"dense-0-bb": 5.0}


def test_a_drain_without_a_mark_goes_on_over_restarts(desired):
    now_s = 1000.0
    made = desired(clock=lambda: now_s)
    made.drain(WORKER, None)
    made.note_drains([WORKER, "dense-1-cc"])
    now_s += 10.0
    made = desired(restarted=True, clock=lambda: now_s)
    assert made.drained_s() == {WORKER: 10.0, "dense-1-cc": 10.0} and made.drains() == {WORKER: None}
    made.note_drains(["dense-1-cc", "dense-2-dd"])
    made.drain(WorkerId("dense-2-dd"), 60.0)
    now_s += 5.0
    assert made.drained_s() == {WORKER: 15.0, "dense-1-cc": 15.0, "dense-2-dd": 5.0}
    made.forget_drains([WORKER])
    made.note_drains([])
    assert desired(restarted=True, clock=lambda: now_s).drained_s() == {"dense-2-dd": 5.0}


def test_the_end_of_a_cluster_is_completed_by_its_controller_and_no_other(desired):
    made = desired()
    made.scale({"attention": 5})
    made.end()
    # What happens meanwhile does not undo it.
    made.note_drains([WORKER])
    made.scale({"attention": 6})
    again = desired(restarted=True)
    assert again.ends
    again.end()
    for restarted in (False, True):
        assert not desired(controller="next", restarted=restarted).ends
        assert desired(controller="next", restarted=restarted).counts() == FIRST


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": 0}, "at least 1"),
        ({"attention": 2000}, "at most"),
        ({"dense": 0}, "at least 1"),
        ({"dense": 2000}, "at most"),
    ],
)
def test_numbers_that_cannot_work_are_refused_and_change_nothing(desired, changes, message):
    made = desired()
    with pytest.raises(InvalidRequest, match=message):
        made.scale(changes)
    assert made.counts() == FIRST == desired(restarted=True).counts()


def test_what_cannot_be_stored_changes_nothing(file):
    full = []

    def store(state):
        if full:
            raise InvalidRequest("the disk is full")
        file.store(state)

    made = Desired(
        FIRST, controller="first", load=file.load, store=store, placement="offload", restarted=False
    )
    full.append(True)
    with pytest.raises(InvalidRequest):
        made.scale({"attention": 5})
    with pytest.raises(InvalidRequest):
        made.drain(WORKER, None)
    assert made.counts() == FIRST and not made.drains()


def test_a_state_that_cannot_be_read_names_the_fix(desired, tmp_path):
    (tmp_path / "desired.json").write_text("{")
    with pytest.raises(InvalidRequest, match="remove the file"):
        desired()
