"""What a gateway serves: the tokens that end an answer."""

from dataclasses import replace

import pytest


@pytest.mark.parametrize(("config_ids", "expected"), [((5, 7), (5, 7)), ((), (2,))])
def test_end_tokens_of_the_configuration_win(served, config_ids, expected):
    """transformers' generate knows no others; the tokenizer's are for models whose configuration has none."""
    assert served.tokenizer.eos_ids[:1] == (2,)
    changed = replace(served, config=replace(served.config, eos_token_ids=config_ids))
    assert changed.stop_ids[: len(expected)] == expected
    assert config_ids == () or changed.stop_ids == config_ids
