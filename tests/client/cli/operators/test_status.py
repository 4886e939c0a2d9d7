"""``farshore status``: what it shows of workers."""

import dataclasses

import pytest

from farshore.client import events
from farshore.client.cli.operators.status import render


@pytest.fixture
def lines():
    """lines(**fields) -> what is shown of a worker with these fields, from the titles of the table on."""
    zeros = {field.name: 0 for field in dataclasses.fields(events.ClusterStatus)}
    of_worker = {field.name: 0 for field in dataclasses.fields(events.Worker)}
    texts = {"worker_id": "dense-0-a", "kind": "dense", "address": "h:1", "state": "ready", "links": ()}

    def rendered(**fields):
        worker = events.Worker(
            **(of_worker | texts | {"device": "cpu", "node": "", "zone": "", "failure": ""} | fields)
        )
        shown = render(events.ClusterStatus(**(zeros | {"workers": (worker,), "sequences": ()})))
        lines = shown.splitlines()
        (at,) = (number for number, line in enumerate(lines) if line.startswith("WORKER"))
        return lines[at:]

    return rendered


@pytest.fixture
def header(lines):
    """header(**fields) -> the titles of the table of workers, and the row of one with these fields."""

    def rendered(**fields):
        titles, row, *_ = lines(**fields)
        return titles.split(), row.split()

    return rendered


def test_a_worker_that_failed_is_shown_with_the_reason(lines):
    assert lines(state="failed", failure="no such model")[2:4] == ["dense-0-a failed: no such model", ""]
    assert lines()[2] == ""


def test_machines_and_zones_are_shown_where_workers_know_them(header):
    titles, _ = header()
    assert titles[-1] == "DEVICE"
    titles, row = header(node="machine-1")
    assert (titles[-1], row[-1]) == ("NODE", "machine-1")
    titles, row = header(node="machine-1", zone="west-2")
    assert (titles[-2:], row[-2:]) == (["NODE", "ZONE"], ["machine-1", "west-2"])
