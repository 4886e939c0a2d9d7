"""A pause of the controller's process costs no lease of the directory that it holds."""

from farshore.kvstore.directory.base import LEASE_S, SETTLE_S
from farshore.kvstore.directory.embedded import EmbeddedDirectory

from .test_conformance import RECORD


def test_leases_hold_until_the_list_is_settled():
    now_s = 0.0
    directory = EmbeddedDirectory(clock=lambda: now_s)
    directory.renew(RECORD)
    now_s = 30.0
    assert directory.listing().workers == (RECORD,)
    while now_s < 30.0 + SETTLE_S:
        listing = directory.listing()
        assert listing.workers == (RECORD,) and not listing.settled
        now_s += LEASE_S / 4
    listing = directory.listing()
    assert listing.settled and not listing.workers
