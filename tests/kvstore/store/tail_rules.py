"""The rules of the store's state machine about tails, which share the first store's arena."""

import hypothesis.strategies as st
from hypothesis.stateful import precondition, rule

from farshore.errors import Full
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.tail import Tail

from .state_models import TailModel, by_token, counts, layouts, random_rows, seeds


class TailRules:
    """Mixin of ``Stores`` in ``test_state_machine.py``, which sets the attributes."""

    arenas: list[Arena]
    tails: list[TailModel]

    @rule(start=st.integers(0, 5), layout=layouts)
    def tail(self, start, layout):
        tail = Tail(arena=self.arenas[0], layout=layout, start=start)
        self.tails.append(TailModel(tail, start, [{} for _ in range(layout.layers)], start))

    @precondition(lambda self: self.tails)
    @rule(data=st.data(), tokens=counts, seed=seeds)
    def append(self, data, tokens, seed):
        model = data.draw(st.sampled_from(self.tails))
        try:
            model.tail.reserve(model.end + tokens)
        except Full:
            return
        for layer in range(model.tail.layout.layers):
            k, v = random_rows(model.tail.layout, tokens, seed + layer)
            model.tail.append(layer, model.end, k, v)
            model.rows[layer].update(enumerate(by_token(k, v), model.end))
        model.end += tokens
        model.tail.advance(model.end)

    @precondition(lambda self: self.tails)
    @rule(data=st.data())
    def truncate(self, data):
        model = data.draw(st.sampled_from(self.tails))
        model.end = data.draw(st.integers(model.start, model.end))
        model.tail.truncate(model.end)

    @precondition(lambda self: self.tails)
    @rule(data=st.data())
    def fork_tail(self, data):
        model = data.draw(st.sampled_from(self.tails))
        try:
            copy = model.tail.fork()
        except Full:
            return
        self.tails.append(TailModel(copy, model.start, [dict(rows) for rows in model.rows], model.end))

    @precondition(lambda self: self.tails)
    @rule(data=st.data())
    def free_tail(self, data):
        model = data.draw(st.sampled_from(self.tails))
        model.tail.free()
        self.tails.remove(model)
