"""Text that arrives in pieces is the text that arrives at once."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from scheduler_service.text.detokenizer import IncrementalDetokenizer

REPLACEMENT = "\ufffd"
# Characters of one to four bytes.
CHARACTERS = st.sampled_from("a z\n\u00e9\u00df\u20ac\u6f22\u5b57\U0001f600\U0001f468\u200d")
TEXTS = st.text(CHARACTERS, max_size=40)


def decode_bytes(ids: Sequence[int]) -> str:
    """A byte-level tokenizer: one token per byte, and a few of several bytes from 256 on."""
    return b"".join(token_bytes(token) for token in ids).decode("utf-8", errors="replace")


# Tokens that begin or end within a character, as byte-level BPE learns them.
TORN_TOKENS = (b"\x9f\x98", b"\x80\xc3", b"\xa9\xc3", b"\xe6\xbc", b"\xa2\xe5\xad\x97", b" the")


def token_bytes(token: int) -> bytes:
    return bytes([token]) if token < 256 else TORN_TOKENS[token - 256]


@st.composite
def pushes(draw: st.DrawFn, ids: st.SearchStrategy[list[int]]) -> list[list[int]]:
    """Any way to hand over ids in order, some of the pieces empty."""
    tokens = draw(ids)
    places = sorted(draw(st.lists(st.integers(0, len(tokens)), max_size=30)))
    return [
        tokens[start:end] for start, end in zip([0, *places], [*places, len(tokens)], strict=True)
    ]


VALID_IDS = TEXTS.map(lambda text: list(text.encode()))
ANY_IDS = st.lists(
    st.one_of(
        st.integers(0, 255 + len(TORN_TOKENS)),
        st.sampled_from([0x61, 0xF0, 0x9F, 0x98, 0x80, 0xC3, 0xA9, 0xE2, 0x82, 0xAC]),
    ),
    max_size=60,
)


@given(prompt=TEXTS, pieces=pushes(VALID_IDS))
def test_any_cut_of_a_text_gives_that_text_and_never_a_torn_character(
    prompt: str, pieces: list[list[int]]
):
    detokenizer = IncrementalDetokenizer(decode_bytes, list(prompt.encode()))
    texts = [detokenizer.push(piece) for piece in pieces]
    assert all(REPLACEMENT not in text for text in texts)
    rest = detokenizer.flush()
    assert "".join(texts) + rest == decode_bytes([token for piece in pieces for token in piece])
    assert rest == ""


@given(pieces=pushes(ANY_IDS))
@settings(max_examples=300)
def test_any_cut_of_any_bytes_gives_the_text_of_one_decode(pieces: list[list[int]]):
    detokenizer = IncrementalDetokenizer(decode_bytes, [])
    texts = [detokenizer.push(piece) for piece in pieces] + [detokenizer.flush()]
    assert "".join(texts) == decode_bytes([token for piece in pieces for token in piece])


@given(text=TEXTS)
def test_each_character_is_shown_with_its_last_byte(text: str):
    detokenizer = IncrementalDetokenizer(decode_bytes, [])
    for character in text:
        *first, last = character.encode()
        assert [detokenizer.push([byte]) for byte in first] == [""] * len(first)
        assert detokenizer.push([last]) == character


@pytest.mark.parametrize("token", [0x61, 0x80, 0xC3])
def test_the_decoded_window_stays_small_whatever_is_generated(token: int):
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_bytes(ids)

    detokenizer = IncrementalDetokenizer(decode, [0x61] * 1000)
    texts = [detokenizer.push([token]) for _ in range(1000)]
    assert longest < 100
    assert "".join(texts) + detokenizer.flush() == decode_bytes([token] * 1000)


def test_a_replacement_character_that_the_model_wrote_itself_is_kept():
    detokenizer = IncrementalDetokenizer(decode_bytes, [])
    text = f"a{REPLACEMENT}{REPLACEMENT}{REPLACEMENT}b"
    shown = "".join(detokenizer.push([byte]) for byte in text.encode())
    assert shown + detokenizer.flush() == text


def test_flush_shows_an_incomplete_character_as_replacement_and_only_once():
    detokenizer = IncrementalDetokenizer(decode_bytes, [])
    assert detokenizer.push(list("\u20ac".encode()[:2])) == ""
    assert detokenizer.flush() == REPLACEMENT
    assert detokenizer.flush() == ""


def test_a_character_that_the_prompt_began_is_not_shown_twice():
    detokenizer = IncrementalDetokenizer(decode_bytes, list("a\u20ac".encode()[:-1]))
    assert detokenizer.push(["\u20ac".encode()[-1], ord("b")]) == "b"


WORDS = ("\u2581Hello", "\u2581world", "!", "\u2581")


@pytest.fixture(scope="module")
def byte_fallback() -> Callable[[Sequence[int]], str]:
    """Decodes as SentencePiece models do: byte tokens 0 to 255, then WORDS."""
    names = [f"<0x{byte:02X}>" for byte in range(256)] + list(WORDS)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: index for index, name in enumerate(names)}, merges=[], byte_fallback=True
        )
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return tokenizer.decode


def test_a_space_before_a_word_survives_a_decoder_that_strips_leading_spaces(
    byte_fallback: Callable[[Sequence[int]], str],
):
    hello, world = 256, 257
    detokenizer = IncrementalDetokenizer(byte_fallback, [hello])
    assert [detokenizer.push([world]) for _ in range(30)] == [" world"] * 30


@pytest.mark.parametrize("prompt", ["", "\U0001f600" * 5, "a\U0001f600"])
def test_a_long_run_of_byte_fallback_tokens_decodes_to_its_characters(
    byte_fallback: Callable[[Sequence[int]], str], prompt: str
):
    detokenizer = IncrementalDetokenizer(byte_fallback, list(prompt.encode()))
    text = "\U0001f600\U0001f468" * 12
    assert "".join(detokenizer.push([byte]) for byte in text.encode()) == text
