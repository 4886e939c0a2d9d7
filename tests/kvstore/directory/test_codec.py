"""A record of another version, which can't be read, costs its worker the place in the list, and no other."""

from dataclasses import replace

import pytest

from farshore.errors import InvalidRequest
from farshore.kvstore.directory import codec
from farshore.kvstore.directory.base import Listing
from farshore.kvstore.directory.embedded import EmbeddedDirectory

from .conftest import through_grpc
from .test_conformance import OTHER, RECORD

STRANGE = {"state": "dreaming", "kind": "memory"}


@pytest.mark.parametrize(("field", "value"), STRANGE.items())
def test_an_unknown_word_in_a_record_is_refused_by_name(field, value):
    message = codec.record_to_pb(replace(OTHER, **{field: value}))
    with pytest.raises(InvalidRequest, match=f"dense-0-bb: {field} '{value}'.*version"):
        codec.record_from_pb(message)


@pytest.mark.parametrize(("field", "value"), STRANGE.items())
def test_a_list_leaves_out_what_it_cannot_read(field, value):
    listing = Listing(
        workers=(replace(OTHER, **{field: value}), RECORD),
        closed=frozenset([RECORD.worker]),
        settled=True,
    )
    assert codec.listing_from_pb(codec.listing_to_pb(listing)) == replace(listing, workers=(RECORD,))


def test_a_worker_of_another_version_is_told_why_it_is_not_listed():
    server, directory = through_grpc(EmbeddedDirectory())
    with pytest.raises(InvalidRequest, match="dense-0-bb: state 'dreaming'"):
        directory.renew(replace(OTHER, state="dreaming"))
    directory.renew(RECORD)
    assert directory.listing().workers == (RECORD,)
    directory.disconnect()
    server.stop(0).wait()
