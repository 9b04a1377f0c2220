"""Deltas of one completion, whenever the client is ready for them."""

from scheduler_service.completion import Completion, Delta
from scheduler_service.sequence import FinishReason, Sequence, SequenceStatus, TokenLogprobs
from scheduler_service.text.detokenizer import IncrementalDetokenizer, StopMatcher

PROMPT = list(b"prompt")


def make(
    *, stop: tuple[str, ...] = (), text: bool = True, include: bool = False, min_tokens: int = 0
) -> Completion:
    return Completion(
        3,
        Sequence(0, PROMPT, max_total_tokens=100),
        IncrementalDetokenizer(lambda ids: bytes(ids).decode(errors="replace"), PROMPT)
        if text
        else None,
        StopMatcher(stop, include_in_output=include) if stop else None,
        min_tokens=min_tokens,
        include_stop_token=include,
    )


def produce(completion: Completion, data: bytes) -> bool:
    """Tokens arrive one by one; returns whether a stop string is complete."""
    for token in data:
        completion.seq.token_ids.append(token)
        if completion.match_stop_strings():
            return True
    return False


def finish(completion: Completion, reason: FinishReason) -> None:
    completion.seq.move_to(SequenceStatus.FINISHED)
    completion.seq.finish_reason = reason


def take(completion: Completion) -> Delta:
    delta = completion.take_delta()
    assert delta is not None
    return delta


def test_nothing_new_is_no_delta():
    completion = make()
    assert completion.take_delta() is None
    produce(completion, b"a")
    assert take(completion).text == "a"
    assert completion.take_delta() is None


def test_tokens_coalesce_until_they_are_taken():
    completion = make()
    produce(completion, b"abc")
    first = take(completion)
    assert (first.index, first.text, first.token_ids) == (3, "abc", list(b"abc"))
    produce(completion, b"de")
    finish(completion, FinishReason.LENGTH)
    last = take(completion)
    assert (last.text, last.token_ids) == ("de", list(b"de"))
    assert last.finish_reason is FinishReason.LENGTH
    assert (last.num_prompt_tokens, last.num_output_tokens) == (6, 5)
    assert completion.take_delta() is None


def test_a_torn_character_waits_for_its_end_but_its_tokens_do_not():
    completion = make()
    euro = "\u20ac".encode()
    produce(completion, euro[:2])
    assert take(completion) == Delta(3, "", list(euro[:2]), [])
    produce(completion, euro[2:])
    assert take(completion).text == "\u20ac"


def test_an_end_within_a_character_shows_the_rest_as_replacement():
    completion = make(stop=("zzz",))
    produce(completion, b"zz\xe2\x82")
    finish(completion, FinishReason.LENGTH)
    assert take(completion).text == "zz\ufffd"


def test_a_stop_token_is_counted_but_has_no_text_unless_asked_for():
    for include, text in ((False, "a"), (True, "a.")):
        completion = make(include=include)
        completion.seq.token_ids += b"a."
        finish(completion, FinishReason.STOP)
        delta = take(completion)
        assert (delta.text, delta.token_ids) == (text, list(b"a."))
        assert delta.stop_reason == ord(".")
        assert delta.num_output_tokens == 2


def test_a_stop_string_cuts_the_text_and_is_the_reason():
    completion = make(stop=("END",))
    assert not produce(completion, b"so EN")
    assert take(completion).text == "so "
    assert produce(completion, b"D")
    finish(completion, FinishReason.STOP)
    delta = take(completion)
    assert (delta.text, delta.token_ids, delta.stop_reason) == ("", list(b"D"), "END")


def test_text_held_for_a_stop_string_is_shown_at_the_end():
    completion = make(stop=("END",))
    produce(completion, b"so EN")
    finish(completion, FinishReason.ABORT)
    delta = take(completion)
    assert (delta.text, delta.stop_reason) == ("so EN", None)


def test_a_stop_token_behind_half_a_stop_string_ends_with_the_text_before_it():
    completion = make(stop=("END",))
    produce(completion, b"so EN")
    # The scheduler ends the sequence before the engine looks for stop strings.
    finish(completion, FinishReason.STOP)
    completion.seq.token_ids.append(0)
    assert not completion.match_stop_strings()
    delta = take(completion)
    assert (delta.text, delta.stop_reason) == ("so EN", 0)


def test_stop_strings_wait_for_min_tokens():
    completion = make(stop=("a",), min_tokens=4)
    assert not produce(completion, b"aaa")
    assert produce(completion, b"a")
    finish(completion, FinishReason.STOP)
    assert take(completion).text == "aaa"


def test_without_a_detokenizer_there_is_no_text():
    completion = make(text=False)
    produce(completion, b"ab")
    assert take(completion) == Delta(3, "", list(b"ab"), [])


def test_log_probabilities_travel_with_their_tokens():
    completion = make()
    entries = [TokenLogprobs(-float(i), [i], [-float(i)]) for i in range(3)]
    for token, entry in zip(b"ab", entries, strict=False):
        completion.seq.token_ids.append(token)
        completion.seq.logprobs.append(entry)
    assert take(completion).logprobs == entries[:2]
    completion.seq.token_ids.append(ord("c"))
    completion.seq.logprobs.append(entries[2])
    assert take(completion).logprobs == entries[2:]
