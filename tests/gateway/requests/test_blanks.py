"""Blanks of tokenizers whose decoder strips a text's first one, and ids that only the tokenizer knows."""

import dataclasses

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from farshore.errors import InvalidRequest
from farshore.gateway.limits import Limits
from farshore.gateway.requests.completion import Completion
from farshore.gateway.requests.validate import prepare
from farshore.models.tokenizer.tokenizer import Tokenizer
from farshore.proto import inference_pb2 as api

VOCABULARY = ["<s>", "<unk>", "</s>", "▁the", "▁cat", "cat"]
BEGIN, THE, CAT = 0, 3, 4


@pytest.fixture
def stripping(served):
    """The served model with a small tokenizer that strips the first blank."""
    words = models.WordLevel({text: token for token, text in enumerate(VOCABULARY)}, "<unk>")
    backend = tokenizers.Tokenizer(words)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken("<s>", normalized=False)])
    tokenizer = Tokenizer(backend, name="small", special_tokens={}, eos_ids=(), chat_template=None)
    return dataclasses.replace(served, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [([BEGIN, THE], " cat cat"), ([THE, BEGIN], " cat cat"), ([BEGIN], "cat cat")],
)
def test_a_completion_keeps_its_first_blank_after_a_prompt(stripping, prompt, text):
    request = api.GenerateRequest(tokens=api.TokenIds(ids=prompt))
    completion = Completion(
        prepare(request, stripping, Limits(), sequence_id="s", default_tokens=8), stripping.tokenizer
    )
    assert completion.push(CAT) + completion.push(CAT) == text


def test_texts_of_alternatives_differ_by_the_blank(stripping):
    assert [stripping.tokenizer.token_text(token) for token in (CAT, CAT + 1)] == [" cat", "cat"]


def test_ids_that_only_the_tokenizer_knows_are_refused(stripping):
    config = dataclasses.replace(stripping.config, vocab=4, eos_token_ids=())
    served = dataclasses.replace(stripping, config=config)
    with pytest.raises(InvalidRequest, match="token id 4 at index 1 is outside the vocabulary"):
        prepare(api.GenerateRequest(text="the cat"), served, Limits(), sequence_id="s", default_tokens=8)
