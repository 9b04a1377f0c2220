"""Stop strings in text that arrives in pieces."""

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_service.text.detokenizer import StopMatcher

# Few letters, so that stop strings overlap each other and the text.
TEXT = st.text("abc", max_size=24)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4)


@st.composite
def cuts(draw: st.DrawFn) -> list[str]:
    """A text in pieces, some of them empty."""
    text = draw(TEXT)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=10)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


def expected(text: str, stops: list[str], num_early: int) -> tuple[int, int, str] | None:
    """End, start and string of the match that is complete first behind `num_early` characters."""
    matches = [
        (start + len(stop), start, stop)
        for stop in stops
        for start in range(len(text))
        if text.startswith(stop, start) and start + len(stop) > num_early
    ]
    return min(matches, default=None)


@given(pieces=cuts(), stops=STOPS, num_early_pieces=st.integers(0, 4), include=st.booleans())
@settings(max_examples=500)
def test_any_cut_finds_the_match_that_is_complete_first_in_the_whole_text(
    pieces: list[str], stops: list[str], num_early_pieces: int, include: bool
):
    matcher = StopMatcher(stops, include_in_output=include)
    shown = ""
    for index, piece in enumerate(pieces):
        shown += matcher.push(piece, may_match=index >= num_early_pieces)
        if matcher.matched is not None:
            break
    shown += matcher.flush()
    text = "".join(pieces)
    match = expected(text, stops, len("".join(pieces[:num_early_pieces])))
    if match is None:
        assert matcher.matched is None
        assert shown == text
    else:
        end, start, stop = match
        assert matcher.matched == stop
        assert shown == text[: end if include else start]


@given(pieces=cuts(), stops=STOPS)
def test_text_that_cannot_become_a_stop_string_is_shown_at_once(
    pieces: list[str], stops: list[str]
):
    matcher = StopMatcher(stops, include_in_output=False)
    shown = seen = ""
    for piece in pieces:
        seen += piece
        shown += matcher.push(piece)
        if matcher.matched is not None:
            return
        held = seen[len(shown) :]
        # Nothing, or the beginning of a stop string.
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_a_stop_string_completed_before_min_tokens_does_not_stop_later():
    matcher = StopMatcher(["ab", "abbb"], include_in_output=False)
    assert matcher.push("ab", may_match=False) == ""
    assert matcher.push("c") == "abc"
    assert matcher.matched is None


def test_a_stop_string_that_begins_before_min_tokens_stops_when_it_is_complete():
    matcher = StopMatcher(["STOP"], include_in_output=False)
    assert matcher.push("xST", may_match=False) == "x"
    assert matcher.push("OPy") == ""
    assert matcher.matched == "STOP"


def test_flush_shows_held_text_once():
    matcher = StopMatcher(["abc"], include_in_output=False)
    assert matcher.push("xab") == "x"
    assert matcher.flush() == "ab"
    assert matcher.flush() == ""
