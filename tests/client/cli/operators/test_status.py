"""``farshore status``: what it shows of workers."""

import dataclasses

import pytest

from farshore.client import events
from farshore.client.cli.operators.status import render


@pytest.fixture
def header():
    """header(**fields) -> the titles of the table of workers, and the row of one with these fields."""
    zeros = {field.name: 0 for field in dataclasses.fields(events.ClusterStatus)}
    of_worker = {field.name: 0 for field in dataclasses.fields(events.Worker)}
    texts = {"worker_id": "dense-0-a", "kind": "dense", "address": "h:1", "state": "ready", "links": ()}

    def rendered(**fields):
        worker = events.Worker(**(of_worker | texts | {"device": "cpu", "node": "", "zone": ""} | fields))
        shown = render(events.ClusterStatus(**(zeros | {"workers": (worker,), "sequences": ()})))
        lines = shown.splitlines()
        (at,) = (number for number, line in enumerate(lines) if line.startswith("WORKER"))
        return lines[at].split(), lines[at + 1].split()

    return rendered


def test_machines_and_zones_are_shown_where_workers_know_them(header):
    titles, _ = header()
    assert titles[-1] == "DEVICE"
    titles, row = header(node="machine-1")
    assert (titles[-1], row[-1]) == ("NODE", "machine-1")
    titles, row = header(node="machine-1", zone="west-2")
    assert (titles[-2:], row[-2:]) == (["NODE", "ZONE"], ["machine-1", "west-2"])
