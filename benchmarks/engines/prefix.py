"""The part of ``farshore bench engines`` in which one engine uses the prefix that another one prefilled.

Called by ``benchmark`` of this folder. Two engines share two shards, which announce their blocks to a
directory. It must not know how a prefix is found.
"""

from itertools import count
from statistics import median

from farshore.benchmarks.cases import Measured
from farshore.benchmarks.engines.asking import connected, prompt
from farshore.benchmarks.engines.cluster import Cluster
from farshore.benchmarks.engines.setting import Setting
from farshore.benchmarks.report import Bar, Result
from farshore.benchmarks.timing import Timing
from farshore.kernels.base import BLOCK_TOKENS

MOST_OF_PREFILL = 0.15
SHARDS = 2
QUESTION_TOKENS = 16
"""Tokens after the prefix, different at each engine."""


def measure(setting: Setting) -> Measured:
    """Rounds of: a new prefix at one engine, then the same prefix with another question at the other one. The
    engines change their parts in every round."""
    sizes = setting.sizes
    blocks = sizes.prefix_tokens // BLOCK_TOKENS
    prefill_s, first_s, cached = [], [], []
    seeds = count()

    def part(tokens: int) -> list[int]:
        return prompt(tokens, seed=next(seeds), vocab=sizes.vocab)

    with Cluster(sizes.spec) as cluster:
        setting.progress("two engines and two shards start")
        for number in range(SHARDS):
            cluster.shard(f"attention-{number}")
        workers = [cluster.engine(f"dense-{number}", threads=setting.facts.threads) for number in range(2)]
        cluster.await_serving()
        with connected(workers[0].address) as one, connected(workers[1].address) as other:
            for engine in (one, other):
                engine.ask(part(BLOCK_TOKENS + QUESTION_TOKENS), max_tokens=1)
            # Else these blocks would be counted as the first prefix's.
            cluster.await_announced(2)
            for number in range(sizes.rounds):
                setting.progress(f"round {number + 1} of {sizes.rounds}")
                prefix = part(sizes.prefix_tokens)
                announced = cluster.directory.announced_blocks
                prefill = one.ask(prefix + part(QUESTION_TOKENS), max_tokens=1)
                cluster.await_announced(announced + blocks)
                hit = other.ask(prefix + part(QUESTION_TOKENS), max_tokens=1)
                prefill_s.append(prefill.first_s)
                first_s.append(hit.first_s)
                cached.append(hit.cached_tokens)
                one, other = other, one
    figures = {"cached_tokens": min(cached), "prompt_tokens": sizes.prefix_tokens + QUESTION_TOKENS}
    results = [
        Result(f"first token of a prefix of {sizes.prefix_tokens}, prefilled", Timing(tuple(prefill_s))),
        Result(f"first token of a prefix of {sizes.prefix_tokens}, found", Timing(tuple(first_s)), figures),
    ]
    share = median(found / filled for found, filled in zip(first_s, prefill_s, strict=True))
    name = f"prefix of {sizes.prefix_tokens} at another engine"
    return results, [Bar.at_most(name, share, MOST_OF_PREFILL, "of the prefill")]
