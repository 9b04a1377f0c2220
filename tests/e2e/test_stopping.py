"""When completions end, and what of the end is in text and tokens."""

import pytest

from nanovllm import Client, FinishReason, RequestOutput, SamplingParams
from tests.e2e.support import MAX_MODEL_LEN, greedy

EOS = 258
LETTERS = "abcdefghijklmnopqrstuvwxyz"
NUM_TOKENS = 60


@pytest.fixture(scope="module")
def letter_ids(shared_client: Client) -> dict[str, int]:
    return {letter: shared_client.tokenize(letter)[0] for letter in LETTERS}


@pytest.fixture
def letters(client: Client, letter_ids: dict[str, int]) -> "Letters":
    return Letters(client, letter_ids)


class Letters:
    """Generates lower-case letters, one per token, always the same ones."""

    def __init__(self, client: Client, letter_ids: dict[str, int]) -> None:
        self.client = client
        self.ids = letter_ids
        self.text = self.generate().text
        assert len(self.text) == NUM_TOKENS
        assert set(self.text) <= set(LETTERS)
        assert len(set(self.text)) > 8

    def params(self, max_tokens: int = NUM_TOKENS, **fields) -> SamplingParams:  # type: ignore[no-untyped-def]
        bias = dict.fromkeys(self.ids.values(), 100.0)
        return SamplingParams(
            temperature=2.0, seed=5, max_tokens=max_tokens, logit_bias=bias, **fields
        )

    def generate(self, **fields) -> RequestOutput:  # type: ignore[no-untyped-def]
        return self.client.generate("start", self.params(**fields))


class TestStopStrings:
    def test_stop_string_over_several_tokens_ends_text_before_it(self, letters: Letters) -> None:
        stop = letters.text[20:25]
        output = letters.generate(stop=stop)
        end = letters.text.index(stop)
        (completion,) = output.completions
        assert completion.finish_reason is FinishReason.STOP
        assert completion.stop_reason == stop
        assert completion.text == letters.text[:end]

    def test_token_ids_end_at_the_token_that_completed_the_match(self, letters: Letters) -> None:
        stop = letters.text[20:25]
        output = letters.generate(stop=stop)
        end = letters.text.index(stop) + len(stop)
        assert output.token_ids == [letters.ids[letter] for letter in letters.text[:end]]
        assert output.completions[0].usage.completion_tokens == end

    def test_matched_string_stays_in_the_text_if_asked_for(self, letters: Letters) -> None:
        stop = letters.text[20:25]
        output = letters.generate(stop=stop, include_stop_str_in_output=True)
        assert output.text == letters.text[: letters.text.index(stop)] + stop

    def test_earliest_match_wins_whatever_the_order(self, letters: Letters) -> None:
        late, early = letters.text[40:44], letters.text[10:14]
        for stops in ((late, early), (early, late)):
            (completion,) = letters.generate(stop=stops).completions
            assert completion.stop_reason == early
            assert completion.text == letters.text[: letters.text.index(early)]

    def test_text_that_only_looks_like_a_stop_string_is_delivered(self, letters: Letters) -> None:
        almost = letters.text[10:20] + "#"
        at_the_end = letters.text[-3:] + "#"
        output = letters.generate(stop=(almost, at_the_end))
        assert output.finish_reason is FinishReason.LENGTH
        assert output.text == letters.text

    def test_stop_string_completed_by_the_last_allowed_token_is_a_stop(
        self, letters: Letters
    ) -> None:
        stop = letters.text[27:30]
        assert letters.text.index(stop) == 27
        (completion,) = letters.generate(stop=stop, max_tokens=30).completions
        assert completion.finish_reason is FinishReason.STOP
        assert completion.text == letters.text[:27]

    def test_no_delta_shows_a_part_of_the_stop_string(self, letters: Letters) -> None:
        stop = letters.text[30:38]
        with letters.client.stream("start", letters.params(stop=stop)) as stream:
            deltas = list(stream)
        shown = "".join(delta.text for delta in deltas)
        assert shown == letters.text[: letters.text.index(stop)]
        assert len(deltas) > 1

    def test_stop_strings_do_not_stop_before_min_tokens(self, letters: Letters) -> None:
        stop = letters.text[0]
        second = letters.text.index(stop, 5)
        output = letters.generate(stop=stop, min_tokens=6)
        assert len(output.token_ids) == second + 1
        assert output.text == letters.text[:second]


class TestStopTokens:
    def test_stop_token_ends_the_ids_but_is_not_in_the_text(self, letters: Letters) -> None:
        letter = letters.text[12]
        end = letters.text.index(letter)
        (completion,) = letters.generate(stop_token_ids=[letters.ids[letter]]).completions
        assert completion.finish_reason is FinishReason.STOP
        assert completion.stop_reason == letters.ids[letter]
        assert completion.text == letters.text[:end]
        assert len(completion.token_ids) == end + 1
        assert completion.token_ids[-1] == letters.ids[letter]

    def test_end_of_sequence_stops_and_is_named(self, client: Client) -> None:
        output = client.generate("a", SamplingParams(logit_bias={EOS: 100.0}, temperature=0.0))
        assert output.token_ids == [EOS]
        assert output.text == ""
        assert output.completions[0].stop_reason == EOS
        assert output.finish_reason is FinishReason.STOP

    def test_ignore_eos_goes_on_past_end_of_sequence(self, client: Client) -> None:
        output = client.generate("a", greedy(5, logit_bias={EOS: 100.0}))
        assert output.token_ids == [EOS] * 5
        assert output.finish_reason is FinishReason.LENGTH
        assert output.completions[0].stop_reason is None

    def test_min_tokens_forbids_end_of_sequence_until_then(self, client: Client) -> None:
        params = SamplingParams(logit_bias={EOS: 100.0}, temperature=0.0, min_tokens=5)
        output = client.generate("a", params)
        assert len(output.token_ids) == 6
        assert EOS not in output.token_ids[:5]
        assert output.token_ids[5] == EOS

    def test_min_tokens_forbids_stop_token_ids_until_then(self, letters: Letters) -> None:
        wanted = letters.ids[letters.text[0]]
        output = letters.generate(stop_token_ids=[wanted], min_tokens=10)
        assert wanted not in output.token_ids[:10]
        assert len(output.token_ids) > 10


class TestLength:
    @pytest.mark.parametrize("max_tokens", [1, 2, 16, 17])
    def test_max_tokens_is_exact(self, client: Client, max_tokens: int) -> None:
        output = client.generate("abc", greedy(max_tokens))
        assert len(output.token_ids) == max_tokens
        assert output.finish_reason is FinishReason.LENGTH

    def test_output_ends_at_the_models_length(self, client: Client) -> None:
        prompt = [1] * (MAX_MODEL_LEN - 9)
        for max_tokens in (None, 1000):
            output = client.generate(
                prompt, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens)
            )
            assert len(output.token_ids) == 9
            assert output.finish_reason is FinishReason.LENGTH

    def test_longest_prompt_leaves_room_for_one_token(self, client: Client) -> None:
        output = client.generate([2] * (MAX_MODEL_LEN - 1), SamplingParams(ignore_eos=True))
        assert len(output.token_ids) == 1
        assert output.finish_reason is FinishReason.LENGTH
