"""Streams and the texts of single tokens: no blank, no byte and no character is lost, split or invented."""

from types import SimpleNamespace

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

from farshore.models.tokenizer.hf import from_hf
from farshore.models.tokenizer.tokenizer import Tokenizer

from .made import TEXTS, folder_of

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="session")
def made(byte_level, pieces, tmp_path_factory) -> SimpleNamespace:
    """Tokenizers of all kinds by name, each with special tokens and one that is added but not special."""
    folder = tmp_path_factory.mktemp("made")
    more = dict(added_tokens_decoder={"5000": dict(content="<|é tool|>", special=False, normalized=False)})
    llama = dict(tokenizer_class="LlamaTokenizer", add_bos_token=True)
    kinds = dict(
        byte_level=dict(settings=more, tokenizer=byte_level),
        llama=dict(settings=llama | more, model=pieces.llama),
        general=dict(settings=more, model=pieces.llama),
        unigram=dict(settings=more, model=pieces.unigram),
    )
    return SimpleNamespace(
        **{name: from_hf(folder_of(folder / name, **files), name) for name, files in kinds.items()}
    )


KINDS = ["byte_level", "llama", "general", "unigram"]


def streamed(tokenizer: Tokenizer, ids: list[int], prompt: list[int] = ()) -> tuple[list[str], str]:
    stream = tokenizer.stream(tokenizer.prompt_end(prompt))
    return [stream.push(token) for token in ids], stream.finish()


def check_prolongs(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> None:
    """The stream is what ``ids`` add to the prompt's text, if both texts are well-formed."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    if UNFINISHED in before + whole:
        return
    assert whole.startswith(before)
    pieces, rest = streamed(tokenizer, ids, prompt)
    assert "".join(pieces) + rest == whole[len(before) :]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_prolongs_any_prompt_by_any_ids(made, kind, data):
    tokenizer = getattr(made, kind)
    ids = st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=12)
    check_prolongs(tokenizer, data.draw(ids), data.draw(ids))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40), cut=st.integers(0, 60))
def test_prolongs_a_text_cut_anywhere(made, kind, text, cut):
    tokenizer = getattr(made, kind)
    ids = tokenizer.encode(text)
    check_prolongs(tokenizer, ids[:cut], ids[cut:])


@pytest.mark.parametrize("kind", KINDS)
def test_real_text_cut_anywhere_never_splits_a_character(made, kind):
    tokenizer = getattr(made, kind)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        for cut in range(min(len(ids), 40)):
            pieces, rest = streamed(tokenizer, ids[cut:], ids[:cut])
            if UNFINISHED not in text:
                assert not any(UNFINISHED in piece for piece in pieces) and rest == ""
            check_prolongs(tokenizer, ids[:cut], ids[cut:])


@pytest.mark.parametrize("kind", KINDS)
def test_joins_to_decode_without_a_prompt(made, kind):
    tokenizer = getattr(made, kind)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        pieces, rest = streamed(tokenizer, ids)
        assert "".join(pieces) + rest == tokenizer.decode(ids)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 49151 + 100), max_size=40))
def test_joins_to_decode_of_any_ids(ours, ids):
    pieces, rest = streamed(ours, ids)
    assert "".join(pieces) + rest == ours.decode(ids)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_joins_to_decode_of_broken_bytes(ours, data):
    """The hardest case: single-byte tokens in any order, with special tokens between them."""
    alphabet = [*range(17, 17 + 256), 0, 2]
    ids = data.draw(st.lists(st.sampled_from(alphabet), max_size=60))
    pieces, rest = streamed(ours, ids)
    assert "".join(pieces) + rest == ours.decode(ids)


def test_the_first_blank_after_a_prompt_is_kept(made):
    for tokenizer in (made.llama, made.general):
        prompt, ids = tokenizer.encode("the"), tokenizer.encode("dog")
        assert tokenizer.decode(ids) == "dog"
        assert "".join(streamed(tokenizer, ids, prompt)[0]) == " dog"
        # A prompt without text leaves the completion at the text's start.
        assert "".join(streamed(tokenizer, ids, tokenizer.encode(""))[0]) == "dog"


def test_blanks_before_the_prompts_end_do_not_count(made):
    """Special tokens between a prompt's text and the completion hide no text before them."""
    tokenizer = made.llama
    prompt = [*tokenizer.encode("the fox"), *tokenizer.encode("[INST][INST][INST][INST][INST]")]
    check_prolongs(tokenizer, prompt, tokenizer.encode("dog"))
    assert len(tokenizer.prompt_end(prompt * 100)) == 4


@pytest.mark.parametrize("kind", ["byte_level", "llama"])
def test_a_character_that_the_prompt_begins_is_completed(made, kind):
    tokenizer = getattr(made, kind)
    ids = tokenizer.encode("the🦜", add_special_tokens=False)
    for cut in range(len(ids) - 3, len(ids)):
        pieces, rest = streamed(tokenizer, ids[cut:], ids[:cut])
        assert ("".join(pieces), rest) == ("🦜", "")


@pytest.mark.parametrize(("kind", "marks"), [("byte_level", 1), ("llama", 3)])
def test_an_unfinished_character_at_the_end(made, kind, marks):
    tokenizer = getattr(made, kind)
    ids = tokenizer.encode("fox🦜", add_special_tokens=False)[:-1]
    pieces, rest = streamed(tokenizer, ids)
    assert ("".join(pieces), rest) == ("fox", UNFINISHED * marks)
    assert tokenizer.decode(ids) == "fox" + UNFINISHED * marks


def test_bytes_between_texts_that_form_no_character(made):
    """Byte fallback writes one mark a byte; whole characters beside them stay, unlike in ``decode``."""
    tokenizer = made.llama
    lead, trail = tokenizer.encode("\xaa", add_special_tokens=False)[-2:]
    fox = tokenizer.encode("fox", add_special_tokens=False)
    pieces, rest = streamed(tokenizer, [*fox, trail, *fox, lead, *fox, lead, trail, trail])
    expected = f"fox{UNFINISHED} fox{UNFINISHED} fox\xaa{UNFINISHED}"
    assert ("".join(pieces) + rest).replace(" ", "") == expected.replace(" ", "")


def test_special_tokens_that_decode_writes_are_streamed():
    """tokenizers writes one whose text the normaliser has changed."""
    backend = tokenizers.Tokenizer(models.BPE({"<s>": 0, "a": 1}, []))
    backend.normalizer = tokenizers.normalizers.Prepend("_")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken("<s>", normalized=True), AddedToken("<e>", normalized=False)])
    tokenizer = Tokenizer(backend, name="m", special_tokens={}, eos_ids=(), chat_template=None)
    assert "".join(streamed(tokenizer, [1, 0, 2, 1])[0]) == tokenizer.decode([1, 0, 2, 1]) == "a_<s>a"


def test_texts_of_single_tokens(made, ours):
    llama = made.llama
    by_text = {llama.token_text(token): token for token in range(llama.vocab_size)}
    assert by_text.keys() >= {" d", "d", "<0xE2>", "<s>", "[INST]", "<|tool|>", "<|é tool|>", " "}
    assert llama.token_text(llama.vocab_size) == ""
    (first,) = ours.encode("é")[:1]
    texts = [ours.token_text(token) for token in ours.encode("Yes no<|im_end|>🦜")]
    assert texts[:3] == ["Yes", " no", "<|im_end|>"]
    assert all(text.startswith("<0x") for text in texts[3:])
    assert ours.token_text(first) == "é"


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.Metaspace(),
        decoders.Metaspace(prepend_scheme="never"),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.Sequence([decoders.ByteLevel()])]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Fuse(),
    ],
)
@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.integers(0, 9), max_size=8), cut=st.integers(0, 8))
def test_decoders_equal_the_backend(decoder, ids, cut):
    vocabulary = ["▁", "a", "▁b", "▁▁▁c", "<0x41>", "d▁", "é", "Ġe", "</s>"]
    backend = tokenizers.Tokenizer(models.WordLevel({text: n for n, text in enumerate(vocabulary)}, "a"))
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken("</s>", normalized=False)])
    tokenizer = Tokenizer(backend, name="here", special_tokens={}, eos_ids=(), chat_template=None)
    check_prolongs(tokenizer, [], ids)
    check_prolongs(tokenizer, ids[:cut], ids[cut:])


def test_a_token_is_cheap_and_the_state_small(ours):
    """Not a measurement: ten thousand undecodable tokens would take minutes if the state grew."""
    broken = ours.encode("😀")[:1]
    for ids in (ours.encode("👩‍👩‍👧‍👦 and so on, ") * 50, broken * 10_000):
        stream = ours.stream()
        for token in ids:
            stream.push(token)
            assert len(stream._utf_8.getstate()[0]) < 4
