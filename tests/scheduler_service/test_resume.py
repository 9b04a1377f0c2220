"""Requests that go on where a broken stream ended."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm.v1 import inference_pb2 as pb
from scheduler_service.completion import Completion, Delta
from scheduler_service.errors import (
    DuplicateRequestError,
    InvalidFieldError,
    NeverFitsError,
    ShuttingDownError,
    SupersededError,
)
from scheduler_service.resume import ReceivedCompletion, ResumeSpec, validate_resume
from scheduler_service.sequence import FinishReason, Sequence, SequenceId, SequenceStatus
from scheduler_service.text.detokenizer import IncrementalDetokenizer, StopMatcher
from scheduler_service.text.tokenizer import Tokenizer
from tests.scheduler.simulated_executor import expected_output
from tests.scheduler_service.engine_harness import MODEL, EngineHarness, ids_of, settle, text_of

PROMPT = [0, 1, 1, 2, 0, 2]
KEY = 77


def received(index: int, token_ids: list[int], num_text_chars: int, **fields):
    return pb.ReceivedCompletion(
        index=index, token_ids=token_ids, num_text_chars=num_text_chars, **fields
    )


def resume(*completions: pb.ReceivedCompletion, key: int = KEY) -> pb.Resume:
    fingerprint = MODEL.fingerprint if completions else ""
    return pb.Resume(key=key, model_fingerprint=fingerprint, completions=completions)


@pytest.fixture
def run(tokenizer: Tokenizer) -> Callable[..., list[Delta]]:
    """Runs one request to its end in an engine of its own."""

    def run(message: pb.Resume | None = None, **params) -> list[Delta]:
        async def main() -> list[Delta]:
            harness = EngineHarness(tokenizer)
            live = harness.submit(
                PROMPT, resume=message, seed=5, **({"ignore_eos": True, "max_tokens": 40} | params)
            )
            reading = harness.read(live)
            await harness.finish(reading)
            await harness.check_nothing_is_left()
            return reading.result()

        return asyncio.run(main())

    return run


def two_streams_make_one(whole: list[Delta], cut: int, rest: list[Delta]) -> None:
    """The first `cut` deltas and those of the resumed call are what one stream would have been."""
    joined = whole[:cut] + rest
    assert ids_of(joined) == ids_of(whole)
    assert text_of(joined) == text_of(whole)
    last, expected = joined[-1], whole[-1]
    assert (last.finish_reason, last.stop_reason) == (expected.finish_reason, expected.stop_reason)
    assert last.num_output_tokens == expected.num_output_tokens
    assert last.num_prompt_tokens == expected.num_prompt_tokens


@pytest.mark.parametrize(
    "params",
    [{}, {"stop": ['#"!!']}, {"stop": ["!"], "min_tokens": 12}, {"detokenize": False}],
    ids=["plain", "stop string", "min_tokens", "no text"],
)
def test_a_request_that_is_resumed_after_any_delta_goes_on_without_a_seam(run, params):
    whole = run(resume(), **params)
    assert len(whole) > 5
    for cut in range(1, len(whole)):
        token_ids, text = ids_of(whole[:cut]), text_of(whole[:cut])
        rest = run(resume(received(0, token_ids, len(text))), **params)
        two_streams_make_one(whole, cut, rest)


def test_only_completions_that_have_not_ended_are_generated_on(tokenizer: Tokenizer):
    async def main() -> None:
        harness = EngineHarness(tokenizer)
        output = expected_output(PROMPT, len(PROMPT) + 9, ())
        live = harness.submit(
            PROMPT,
            resume=resume(
                received(0, [], 0, is_finished=True),
                received(2, output[:4], 4),
            ),
            n=3,
            seed=5,
            ignore_eos=True,
            max_tokens=9,
        )
        reading = harness.read(live)
        await harness.finish(reading)
        deltas = reading.result()
        assert {delta.index for delta in deltas} == {1, 2}
        assert ids_of(deltas, 1) == output
        assert ids_of(deltas, 2) == output[4:]
        assert len(text_of(deltas, 2)) == 5
        await harness.check_nothing_is_left()

    asyncio.run(main())


def test_a_resumed_sequence_counts_no_output_as_cached_prompt(tokenizer: Tokenizer):
    async def main() -> None:
        harness = EngineHarness(tokenizer)
        output = expected_output(PROMPT, len(PROMPT) + 30, ())
        first = harness.read(harness.submit(PROMPT, max_tokens=30, ignore_eos=True))
        await harness.finish(first)
        again = harness.submit(
            PROMPT,
            resume=resume(received(0, output[:20], 20)),
            seed=1,
            max_tokens=30,
            ignore_eos=True,
        )
        reading = harness.read(again)
        await harness.finish(reading)
        assert reading.result()[-1].num_cached_tokens == len(PROMPT)
        assert ids_of(reading.result()) == output[20:]

    asyncio.run(main())


def test_a_call_with_the_key_of_a_live_request_takes_its_place(tokenizer: Tokenizer):
    async def main() -> None:
        harness = EngineHarness(tokenizer)
        params = {"seed": 1, "max_tokens": 30, "ignore_eos": True}
        older = harness.read(harness.submit(PROMPT, request_id="x", resume=resume(), **params))
        await harness.step()
        newer = harness.read(harness.submit(PROMPT, request_id="x", resume=resume(), **params))
        await harness.finish(newer)
        with pytest.raises(SupersededError):
            await older
        assert ids_of(newer.result()) == expected_output(PROMPT, len(PROMPT) + 30, ())
        await harness.check_nothing_is_left()

    asyncio.run(main())


@pytest.mark.parametrize("other", [None, resume(key=KEY + 1)], ids=["no key", "another key"])
def test_a_live_request_stays_with_whoever_does_not_know_its_key(tokenizer: Tokenizer, other):
    async def main() -> None:
        harness = EngineHarness(tokenizer)
        params = {"max_tokens": 5, "ignore_eos": True}
        older = harness.read(harness.submit(PROMPT, request_id="x", resume=resume(), **params))
        with pytest.raises(DuplicateRequestError):
            harness.submit(PROMPT, request_id="x", resume=other, **params)
        await harness.finish(older)
        assert len(ids_of(older.result())) == 5

    asyncio.run(main())


def test_a_request_without_a_key_is_never_taken_over(tokenizer: Tokenizer):
    async def main() -> None:
        harness = EngineHarness(tokenizer)
        params = {"max_tokens": 5, "ignore_eos": True}
        older = harness.read(harness.submit(PROMPT, request_id="x", **params))
        with pytest.raises(DuplicateRequestError):
            harness.submit(PROMPT, request_id="x", resume=resume(), **params)
        await harness.finish(older)

    asyncio.run(main())


def test_output_that_no_longer_fits_the_executor_is_refused(tokenizer: Tokenizer):
    async def main() -> None:
        harness = EngineHarness(tokenizer)
        # The executor's length is 128, the model's 256.
        item = received(0, [0] * 122, 122)
        with pytest.raises(NeverFitsError):
            harness.submit(PROMPT, resume=resume(item), seed=1, max_tokens=200)
        await harness.check_nothing_is_left()

    asyncio.run(main())


def test_shutting_down_refuses_new_requests_and_ends_live_ones_so_that_they_can_resume(
    tokenizer: Tokenizer,
):
    async def main() -> None:
        harness = EngineHarness(tokenizer)
        live = harness.read(harness.submit(PROMPT, max_tokens=50, ignore_eos=True))
        await harness.step()
        error = ShuttingDownError("the server shuts down", 1.0)
        harness.engine.refuse_new(error)
        with pytest.raises(ShuttingDownError):
            harness.submit(PROMPT)
        await harness.step()
        assert not live.done()
        harness.engine.fail_all(error)
        await settle()
        with pytest.raises(ShuttingDownError):
            await live
        await harness.check_nothing_is_left()
        harness.engine.refuse_new(None)
        again = harness.read(harness.submit(PROMPT, max_tokens=5, ignore_eos=True))
        await harness.finish(again)

    asyncio.run(main())


def generate_request(message: pb.Resume, **params) -> pb.GenerateRequest:
    fields = {"seed": 1, "n": 2, "max_tokens": 4} | params
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=PROMPT),
        sampling_params=pb.SamplingParams(**fields),
        resume=message,
    )


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (resume(key=0), "resume.key"),
        (pb.Resume(key=KEY, model_fingerprint="0" * 64), "resume.model_fingerprint"),
        (pb.Resume(key=KEY, completions=[received(0, [1], 1)]), "resume.model_fingerprint"),
        (resume(received(2, [1], 1)), "resume.completions[0].index"),
        (resume(received(-1, [1], 1)), "resume.completions[0].index"),
        (resume(received(1, [1], 1), received(1, [1], 1)), "resume.completions[1].index"),
        (resume(*[received(0, [], 0)] * 3), "resume.completions"),
        (resume(received(0, [1] * 4, 1)), "resume.completions[0].token_ids"),
        (resume(received(0, [320], 1)), "resume.completions[0].token_ids"),
        (resume(received(0, [1, -1], 1)), "resume.completions[0].token_ids"),
        (resume(received(0, [1], -1)), "resume.completions[0].num_text_chars"),
        (
            resume(*(received(index, [], 0, is_finished=True) for index in range(2))),
            "resume.completions",
        ),
    ],
)
def test_a_state_that_no_client_can_be_in_is_refused_by_name(message: pb.Resume, field: str):
    with pytest.raises(InvalidFieldError) as caught:
        validate_resume(generate_request(message), MODEL, n=2, max_tokens=4)
    assert caught.value.field == field


def test_what_was_received_needs_the_prompt_as_ids_and_the_seed():
    request = generate_request(resume(received(0, [1], 1)))
    assert validate_resume(request, MODEL, n=2, max_tokens=4) == ResumeSpec(
        KEY, {0: ReceivedCompletion((1,), 1, is_finished=False)}
    )
    request.sampling_params.ClearField("seed")
    with pytest.raises(InvalidFieldError, match=r"sampling_params\.seed"):
        validate_resume(request, MODEL, n=2, max_tokens=4)
    request.sampling_params.seed = 1
    request.text = "abc"
    with pytest.raises(InvalidFieldError, match="token_ids"):
        validate_resume(request, MODEL, n=2, max_tokens=4)


def test_more_text_than_the_tokens_have_is_refused(run):
    with pytest.raises(InvalidFieldError, match="3 tokens have 3"):
        run(resume(received(0, [0, 1, 2], 100)))


def test_text_that_did_not_arrive_with_its_tokens_is_sent(run):
    whole = run(resume())
    token_ids = ids_of(whole[:5])
    rest = run(resume(received(0, token_ids, 2)))
    assert text_of(rest) == text_of(whole)[2:]
    assert ids_of(rest) == ids_of(whole)[len(token_ids) :]


def test_what_was_received_up_to_a_stop_string_is_finished(tokenizer: Tokenizer):
    async def main() -> None:
        harness = EngineHarness(tokenizer)
        live = harness.submit(
            PROMPT,
            resume=resume(received(0, [0, 1, 2], 2), received(1, [0], 1)),
            n=2,
            seed=1,
            stop=["#"],
            max_tokens=6,
            ignore_eos=True,
        )
        reading = harness.read(live)
        await harness.finish(reading)
        first = [delta for delta in reading.result() if delta.index == 0]
        assert [(delta.text, delta.token_ids) for delta in first] == [("", [])]
        assert (first[0].finish_reason, first[0].stop_reason) == (FinishReason.STOP, "#")
        assert any(delta.finish_reason for delta in reading.result() if delta.index == 1)
        await harness.check_nothing_is_left()

    asyncio.run(main())


@dataclass
class Writer:
    """A completion whose tokens come from a list; sends what the engine would."""

    tokenizer: Tokenizer
    stop: list[str]
    min_tokens: int
    token_ids: list[int]
    deltas: list[Delta] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.completion = self._completion(())

    def _completion(self, output: tuple[int, ...]) -> Completion:
        seq = Sequence(SequenceId(0), PROMPT, output_token_ids=output, max_total_tokens=10**6)
        return Completion(
            0,
            seq,
            IncrementalDetokenizer(
                lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True), PROMPT
            ),
            StopMatcher(self.stop, include_in_output=False) if self.stop else None,
            min_tokens=self.min_tokens,
        )

    def append(self, end: int) -> None:
        """Generates up to a number of tokens, then sends a delta."""
        seq = self.completion.seq
        while seq.num_output_tokens < end and not seq.is_finished:
            seq.token_ids.append(self.token_ids[seq.num_output_tokens])
            if self.completion.match_stop_strings():
                self._finish(FinishReason.STOP)
        if not seq.is_finished and seq.num_output_tokens == len(self.token_ids):
            self._finish(FinishReason.LENGTH)
        delta = self.completion.take_delta()
        if delta is not None:
            self.deltas.append(delta)

    def _finish(self, reason: FinishReason) -> None:
        self.completion.seq.move_to(SequenceStatus.FINISHED)
        self.completion.seq.finish_reason = reason

    def break_off(self) -> None:
        """Another server takes over from what was sent."""
        token_ids, text = tuple(ids_of(self.deltas)), text_of(self.deltas)
        self.completion = self._completion(token_ids)
        self.completion.resume(ReceivedCompletion(token_ids, len(text), is_finished=False))


@given(st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_text_has_no_seam_whatever_the_bytes_and_wherever_the_stream_breaks(
    tokenizer: Tokenizer, data: st.DataObject
):
    text = data.draw(st.text(alphabet="ab\u00e9\u20ac\U0001f600", max_size=24))
    noise = data.draw(st.lists(st.integers(0, 255), max_size=6))
    position = data.draw(st.integers(0, 24))
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    token_ids = token_ids[:position] + noise + token_ids[position:]
    if not token_ids:
        return
    stop = data.draw(st.sampled_from([[], ["ab\u00e9", "\u20ac\u20ac"], ["a"]]))
    min_tokens = data.draw(st.integers(0, 6))
    whole = Writer(tokenizer, stop, min_tokens, token_ids)
    whole.append(len(token_ids))
    cut = Writer(tokenizer, stop, min_tokens, token_ids)
    ends = sorted(data.draw(st.lists(st.integers(1, len(token_ids)), max_size=8)))
    for start, end in pairwise([0, *ends, len(token_ids)]):
        cut.append(end)
        if cut.deltas and cut.deltas[-1].finish_reason is not None:
            break
        if start != end and data.draw(st.booleans()):
            cut.break_off()
    assert text_of(cut.deltas) == text_of(whole.deltas)
    assert ids_of(cut.deltas) == ids_of(whole.deltas)
    assert cut.deltas[-1].finish_reason == whole.deltas[-1].finish_reason
