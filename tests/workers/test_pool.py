"""The shards that new spans go to: who does not answer is left alone for a while."""

from concurrent.futures import Executor

from farshore.attention_offload.base import ShardIdentity
from farshore.errors import TransportError
from farshore.ids import WorkerId
from farshore.workers.pool import ASK_AGAIN_S, Pool

A, B = WorkerId("a"), WorkerId("b")


class Peer:
    def __init__(self, worker, budget_bytes):
        self.identity = ShardIdentity(worker, 1, "here", budget_bytes, budget_bytes // 2, 0, "incarnation")
        self.dead = False
        self.asked = 0

    def identify(self):
        self.asked += 1
        if self.dead:
            raise TransportError("nobody answers")
        return self.identity


class AtOnce(Executor):
    def submit(self, call, /, *args):
        call(*args)


def made():
    peers = {A: Peer(A, 100), B: Peer(B, 60)}
    now_s = [0.0]
    return Pool(peers, [A, B], helper=AtOnce(), clock=lambda: now_s[0]), peers, now_s


def test_who_is_silent_is_asked_again_later():
    pool, peers, now_s = made()
    peers[B].dead = True
    assert pool.free() == {A: 50} and pool.silent() == [B]
    peers[B].dead = False
    assert pool.free() == {A: 50} and peers[B].asked == 1, "it was asked again at once"
    assert list(pool.answering()) == [A]
    now_s[0] = ASK_AGAIN_S
    assert pool.free() == {A: 50, B: 30} and pool.silent() == []


def test_if_nobody_answers_all_are_asked():
    pool, peers, _ = made()
    peers[A].dead = peers[B].dead = True
    assert pool.free() == {} and pool.silent() == [A, B]
    peers[B].dead = False
    assert pool.free() == {B: 30} and pool.silent() == [A]


def test_budgets_are_remembered_and_unknown_before():
    pool, peers, now_s = made()
    peers[A].dead = True
    assert pool.budgets() is None
    peers[A].dead = False
    assert pool.budgets() is None, "it was asked again at once"
    now_s[0] = ASK_AGAIN_S
    pool.free()
    assert pool.budgets() == {A: 100, B: 60}
    peers[A].dead = peers[B].dead = True
    asked = peers[A].asked
    assert pool.budgets() == {A: 100, B: 60} and peers[A].asked == asked
