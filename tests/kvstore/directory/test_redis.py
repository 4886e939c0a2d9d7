"""The directory in Redis: what it leaves there, who may use it, and a Redis that is full."""

import datetime
import ipaddress
import socket
import threading
import time
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from farshore.benchmarks.engines.redis_server import RedisServer
from farshore.errors import InvalidRequest, TransportError
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import MOST_EVENTS, Announcement, ClusterEvent
from farshore.kvstore.directory.redis.address import RedisAddress
from farshore.kvstore.directory.redis.directory import RedisDirectory
from farshore.kvstore.directory.redis.scripts import SWEEP_BLOCKS

from .conftest import VALKEY, RealTime, until
from .test_conformance import OTHER, RECORD, announce, holders, names

PERMISSIONS = "~farshore:* +@read +@write +@scripting +@connection +time"
"""What the documentation tells an operator to allow."""


def command(directory, *words):
    return directory._client.call(lambda redis: redis.execute_command(*words))


@pytest.fixture(params=["redis", VALKEY])
def here(request, servers, patient):
    made = RealTime(servers(request.param), restarted=False, lease_s=60.0)
    yield made
    made.end()


def event(number):
    return ClusterEvent(number, 1.5 + number, "joined", "dense-0-bb", "at 127.0.0.1:7, ä")


def test_every_key_expires_but_the_desired_state_and_the_marks(here):
    directory = here.directory
    for record in (RECORD, OTHER):
        directory.renew(record)
        announce(directory, record, 0, 1, added=[1 << 200])
    announce(directory, RECORD, 1, 2, removed=[1 << 200], added=[2 << 200])
    directory.close([RECORD.worker])
    directory.store_state({"counts": {"dense": 1}})
    directory.publish([event(1)])
    directory.listing()
    keys = [key.decode() for key in command(directory, "KEYS", "*")]
    assert all(key.startswith("farshore:{default}:") for key in keys)
    lasting = {key.rpartition(":")[2] for key in keys if command(directory, "PTTL", key) == -1}
    assert lasting == {"state", "revision", "marks"}
    for record in (RECORD, OTHER):
        directory.withdraw(record.worker)
    directory.listing()
    assert command(directory, "HLEN", "farshore:{default}:holders") == 0
    assert not [key for key in command(directory, "KEYS", "*") if b"-0-" in key]


def test_a_record_that_cannot_be_read_is_not_listed(here):
    """Of another version, or damaged: the other workers are listed all the same."""
    directory = here.directory
    directory.renew(replace(RECORD, worker=WorkerId("attention-1-cc"), state="dreaming"))
    directory.renew(OTHER)
    directory.renew(RECORD)
    command(directory, "SET", f"farshore:{{default}}:lease:{OTHER.worker}", b"\xff\xff", "KEEPTTL")
    assert directory.listing().workers == (RECORD,)


def test_blocks_of_ended_workers_are_removed_step_by_step(here):
    """A list removes so many that no other caller notices."""
    directory = here.directory
    numbers = [number << 200 for number in range(1, SWEEP_BLOCKS + 2)]
    directory.renew(OTHER)
    assert announce(directory, OTHER, 0, 1, added=numbers[:2]) == 1
    for _ in range(2):
        directory.renew(RECORD)
        assert announce(directory, RECORD, 0, 1, added=numbers) == 1
        directory.withdraw(RECORD.worker)
        assert holders(directory, *numbers[:3]) == [{OTHER.worker}, {OTHER.worker}, set()]
    for left in (3, 2, 2):
        directory.listing()
        assert command(directory, "HLEN", "farshore:{default}:holders") in (left, 2)
    assert command(directory, "SMEMBERS", "farshore:{default}:workers") == {OTHER.worker.encode()}
    assert holders(directory, *numbers[:3]) == [{OTHER.worker}, {OTHER.worker}, set()]


def test_the_desired_state_is_kept(here):
    assert here.directory.load_state() is None
    state = {"counts": {"dense": 2, "attention": 3}, "draining": ["a"]}
    here.directory.store_state(state)
    assert here.other().load_state() == state


def test_an_older_state_gives_way(here):
    """As when a replica takes over at once, without the last writes: the list is settled meanwhile."""
    directory = here.directory
    directory.store_state({"a": 1})
    keys = [f"farshore:{{default}}:{name}" for name in ("state", "revision")]
    older = [(key, command(directory, "GET", key)) for key in keys]
    directory.store_state({"a": 2})
    late = here.other()
    assert late.load_state() == {"a": 2}
    for key, value in older:
        command(directory, "SET", key, value)
    assert directory.listing().settled
    assert here.other().load_state() == {"a": 2}
    directory.store_state({"a": 3})
    # A client that knows an older state only does not bring that back.
    late.listing()
    assert directory.load_state() == {"a": 3}


def test_the_last_to_store_a_state_wins(here):
    """Also over one whose clock is ahead."""
    directory, other = here.directory, here.other()
    directory.store_state({"a": 1})
    command(directory, "SET", "farshore:{default}:revision", round(time.time() * 1000) + 3_600_000)
    other.store_state({"a": 2})
    assert directory.load_state() == {"a": 2}
    directory.store_state({"a": 3})
    other.listing()
    assert here.other().load_state() == {"a": 3}


def test_a_state_without_a_number_is_read(here):
    """As a version before stored it."""
    directory = here.directory
    command(directory, "SET", "farshore:{default}:state", '{"a": 1}')
    assert directory.load_state() == {"a": 1}
    directory.listing()
    directory.store_state({"a": 2})
    assert here.other().load_state() == {"a": 2}


def test_the_newest_events_are_kept(here):
    directory = here.directory
    assert directory.events() == []
    for numbers in ([3], [3, 4], [4, 2]):
        directory.publish([event(number) for number in numbers])
    assert directory.events() == [event(3), event(4)]
    assert directory.events(3) == [event(4)]
    for number in range(5, MOST_EVENTS + 10):
        directory.publish([event(number)])
    assert [kept.number for kept in directory.events()] == list(range(10, MOST_EVENTS + 10))


def test_events_that_were_lost_come_back(here):
    """As when a replica takes over that lacks the last ones, or Redis starts empty: with the next list."""
    directory, key = here.directory, "farshore:{default}:events"
    directory.publish([event(1)])
    older = command(directory, "DUMP", key)
    directory.publish([event(1), event(2)])
    command(directory, "RESTORE", key, 0, older, "REPLACE")
    assert directory.events() == [event(1)]
    here.other().listing()
    assert directory.events() == [event(1)]
    directory.listing()
    assert directory.events() == [event(1), event(2)]
    command(directory, "DEL", key)
    directory.listing()
    assert directory.events() == [event(1), event(2)]


def test_a_full_redis_lists_without_the_events_that_were_lost(here):
    directory = here.directory
    directory.renew(RECORD)
    directory.publish([event(1)])
    command(directory, "DEL", "farshore:{default}:events")
    try:
        command(directory, "CONFIG", "SET", "maxmemory", "1")
        assert names(directory) == [RECORD.worker] and directory.events() == []
    finally:
        command(directory, "CONFIG", "SET", "maxmemory", "0")
    directory.listing()
    assert directory.events() == [event(1)]


def test_clusters_of_two_names_share_a_redis(here):
    blue = here.other(cluster="blue")
    here.directory.renew(RECORD)
    here.directory.store_state({"a": 1})
    assert names(blue) == [] and blue.load_state() is None
    blue.renew(OTHER)
    assert names(here.directory) == [RECORD.worker]


def test_a_name_that_is_in_use_is_refused(here):
    here.directory.renew(RECORD)
    other = RedisDirectory(here.address, lease_s=0.05)
    with pytest.raises(InvalidRequest, match=r"attention-0 is at 127\.0\.0\.1:7; give this one another name"):
        other.claim()


def test_the_leases_of_an_ended_cluster_run_out(here):
    here.renew_briefly(RECORD)
    other = RedisDirectory(here.address, lease_s=20.0)
    other.claim()
    listing = other.listing()
    assert listing.settled and not listing.workers


def test_leases_that_ran_out_in_a_pause_are_those_of_an_ended_cluster(here, monkeypatch):
    """Of the process that claims the name, after it has seen them."""
    now_s = 0.0
    other = RedisDirectory(here.address, lease_s=0.05, clock=lambda: now_s)
    here.directory.renew(RECORD)
    listing = other.listing

    def paused():
        nonlocal now_s
        found = listing()
        here.directory.withdraw(RECORD.worker)
        now_s += 10.0
        return found

    monkeypatch.setattr(other, "listing", paused)
    other.claim()
    assert not listing().workers


def test_a_full_redis_keeps_leases(here):
    directory = here.directory
    try:
        directory.renew(RECORD)
        command(directory, "CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(TransportError, match="maxmemory"):
            directory.announce(RECORD.worker, Announcement(since=0, until=1, added=(bytes(32),)))
        directory.renew(OTHER)
        assert names(directory) == [RECORD.worker, OTHER.worker]
        assert holders(directory, 1) == [set()]
        directory.withdraw(OTHER.worker)
        directory.close([RECORD.worker])
        directory.store_state({"a": 1})
        assert directory.listing().closed == {RECORD.worker}
    finally:
        command(directory, "CONFIG", "SET", "maxmemory", "0")


def signed(name, folder, issuer=None):
    """(certificate, key) for 127.0.0.1, written to ``folder``; signed by itself, or by ``issuer``."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    authority, signer = issuer or (None, key)
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.subject if authority else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
    )
    certificate = builder.sign(signer, hashes.SHA256())
    (folder / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / f"{name}.key").write_bytes(key.private_bytes(*private))
    return certificate, key


@pytest.fixture
def secured(tmp_path, server_binary):
    """(a Redis with TLS, client certificates and an ACL; the URL; the password's file)"""
    authority = signed("ca", tmp_path)
    for name in ("server", "client"):
        signed(name, tmp_path, authority)
    password = tmp_path / "password"
    password.write_text("pass word\n")
    (tmp_path / "users.acl").write_text(
        f"user default off\nuser farshore on #{_sha256('pass word')} {PERMISSIONS}\n"
    )
    server = RedisServer(server_binary("redis"), tmp_path)
    files = {
        "tls-cert-file": "server.crt",
        "tls-key-file": "server.key",
        "tls-ca-cert-file": "ca.crt",
        "aclfile": "users.acl",
    }
    options = [text for name, file in files.items() for text in (f"--{name}", str(tmp_path / file))]
    server.start("--port", "0", "--tls-port", str(server.port), *options)
    url = f"rediss://farshore@127.0.0.1:{server.port}/0?ca_file={tmp_path}/ca.crt&password_file={password}"
    yield server, f"{url}&cert_file={tmp_path}/client.crt&key_file={tmp_path}/client.key", password
    server.kill()


def _sha256(text):
    digest = hashes.Hash(hashes.SHA256())
    digest.update(text.encode())
    return digest.finalize().hex()


def test_tls_certificates_and_a_user_with_few_rights(secured, tmp_path):
    server, url, password = secured
    directory = RedisDirectory(RedisAddress.parse(url))
    directory.claim()
    directory.renew(RECORD)
    directory.close([RECORD.worker])
    assert announce(directory, RECORD, 0, 1, added=[1 << 200]) == 1
    assert holders(directory, 1 << 200) == [{RECORD.worker}]
    directory.store_state({"a": 1})
    directory.publish([event(1)])
    assert directory.load_state() == {"a": 1} and directory.events() == [event(1)]
    assert directory.listing().closed == {RECORD.worker}
    directory.withdraw(RECORD.worker)

    password.write_text("another")
    directory.disconnect()
    with pytest.raises(InvalidRequest, match=r"^rediss://127.0.0.1:\d+/0 refuses .*--redis-password-file"):
        directory.listing()
    password.unlink()
    with pytest.raises(InvalidRequest, match="No such file"):
        directory.listing()
    with pytest.raises(TransportError, match="CERTIFICATE_VERIFY_FAILED"):
        RedisDirectory(RedisAddress.parse(url.replace(f"ca_file={tmp_path}/ca.crt&", ""))).listing()
    with pytest.raises(TransportError, match="does not answer"):  # It expects TLS.
        RedisDirectory(RedisAddress.parse(f"redis://127.0.0.1:{server.port}")).listing()


def test_a_redis_that_hangs_while_it_is_connected_to(tmp_path, secured):
    server, url, _ = secured
    server.freeze()
    for address in (url, f"redis://127.0.0.1:{server.port}"):
        with pytest.raises(TransportError, match="does not answer"):
            RedisDirectory(RedisAddress.parse(address)).listing()


def test_another_server_is_no_redis():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(InvalidRequest, match="is no Redis"):
            RedisDirectory(RedisAddress.parse(f"redis://127.0.0.1:{port}")).listing()
        thread.join()


def test_time_that_is_set_forward_loses_no_worker(here):
    """As leases that ran out while the process was paused."""
    directory = here.directory
    directory.renew(RECORD)
    assert directory.listing().settled
    before_ms = round((time.time() - 3600) * 1000)
    command(directory, "HSET", "farshore:{default}:clock", "listed", before_ms)
    assert not directory.listing().settled
    assert not here.other().listing().settled


def test_a_client_that_was_away_is_unsettled_alone(here):
    """Its own pause, or a network that was cut."""
    now_s = 0.0
    directory = RedisDirectory(here.address, lease_s=60.0, clock=lambda: now_s)
    assert directory.listing().settled
    now_s = 60.0
    assert not directory.listing().settled
    assert here.other().listing().settled

    def settled():
        nonlocal now_s
        now_s += 15.0
        return directory.listing().settled

    until(lambda: None, settled)
    assert now_s == 240.0
