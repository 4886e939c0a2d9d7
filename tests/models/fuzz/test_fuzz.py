"""Random checkpoints give transformers' answers, or a refusal: never another answer.

The long form is run by command: ``pytest -m soak -s tests/models/fuzz``. A failing draw prints its recipe;
``compare(Recipe(...), forward)`` repeats it alone.
"""

import itertools
import secrets
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, given, seed, settings

from .compare import Outcome, compare, compare_gguf
from .draw_recipe import recipes
from .gguf_recipe import gguf_recipes

FORMS = {"folder": (compare, recipes), "gguf": (compare_gguf, gguf_recipes)}
RUN = 10
"""Examples of one run of hypothesis: after ten it repeats parts of earlier ones instead of drawing anew."""
MOST_REFUSED = 0.2
MOST_UNCOMPARED = 0.05
"""Share of draws that we serve but transformers fails to load, so that nothing was compared."""


@pytest.mark.parametrize(("form", "draws"), [("folder", 40), ("gguf", 25)])
def test_short(form, draws, forward):
    require_shares(surveyed(form, draws, forward, first_seed=0))


@pytest.mark.soak
@pytest.mark.parametrize("form", list(FORMS))
def test_long(form, forward):
    first_seed = secrets.randbelow(10**6)
    outcomes = surveyed(form, 300, forward, first_seed=first_seed)
    print(f"\n{form}, seeds from {first_seed}:")
    for outcome, count in outcomes.most_common():
        print(f"{count:5} {outcome.kind}: {outcome.reason}")
    require_shares(outcomes)


def surveyed(form: str, draws: int, forward: Callable[..., Any], *, first_seed: int) -> Counter[Outcome]:
    """Outcomes of ``draws`` different checkpoints. A Difference is shrunk and raised."""
    outcomes: Counter[Outcome] = Counter()
    seen: set[str] = set()
    check, strategy = FORMS[form]

    @settings(max_examples=RUN, deadline=None, database=None, phases=[Phase.generate, Phase.shrink])
    @given(strategy())
    def run(recipe: Any) -> None:
        if repr(recipe) not in seen and outcomes.total() < draws:
            outcome = check(recipe, forward)
            seen.add(repr(recipe))
            outcomes[outcome] += 1

    for number in itertools.count(first_seed):
        if outcomes.total() == draws:
            return outcomes
        seed(number)(run)()


def require_shares(outcomes: Counter[Outcome]) -> None:
    shares: Counter[str] = Counter()
    for outcome, count in outcomes.items():
        shares[outcome.kind] += count / outcomes.total()
    print(", ".join(f"{kind} {share:.1%}" for kind, share in shares.items()))
    assert shares["refused"] + shares["refused by both"] <= MOST_REFUSED, outcomes
    assert shares["ours alone"] <= MOST_UNCOMPARED, outcomes
