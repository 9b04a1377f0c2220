"""Closed and open loops, against scripted targets and a scripted server."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from google.rpc import code_pb2

from nanovllm import AsyncClient, SamplingParams
from nanovllm.load import (
    GrpcTarget,
    LoadReport,
    LoadRequest,
    Session,
    run_closed,
    run_load,
    run_open,
)
from nanovllm.load.target import Piece, RequestFailedError
from nanovllm.outputs import Usage
from nanovllm.v1.inference_pb2 import FINISH_REASON_ABORT
from tests.client.fake_server import error_status, overloaded

PARAMS = SamplingParams()
#: Limit for what ought to happen at once, generous because CI machines stall.
LIMIT_S = 30.0


def single(prompt: str = "a") -> Session:
    return Session([LoadRequest(prompt, PARAMS)])


class HeldTarget:
    """Answers each request once so many are under way; keeps their prompts."""

    def __init__(self, num_held: int = 1) -> None:
        self.prompts: list[object] = []
        self.most_live = 0
        self._num_held = num_held
        self._num_live = 0
        self._enough = asyncio.Event()

    async def answer(self, request: LoadRequest) -> AsyncIterator[Piece]:
        self.prompts.append(request.prompt)
        self._num_live += 1
        self.most_live = max(self.most_live, self._num_live)
        if self._num_live >= self._num_held:
            self._enough.set()
        try:
            await asyncio.wait_for(self._enough.wait(), LIMIT_S)
            # Lets others start, if nothing stops them.
            for _ in range(20):
                await asyncio.sleep(0)
            yield Piece(1, token_ids=[7], text="x")
            yield Piece(2, token_ids=[8, 9], text="yz", is_last=True, usage=Usage(5, 3, 4))
        finally:
            self._num_live -= 1


class FailingTarget:
    """Refuses the second request and answers the others."""

    def __init__(self) -> None:
        self.num_requests = 0

    async def answer(self, request: LoadRequest) -> AsyncIterator[Piece]:
        self.num_requests += 1
        if self.num_requests == 2:
            raise RequestFailedError("FULL", "no room", is_refusal=True)
        yield Piece(1, token_ids=[1], is_last=True)


class TestOpenLoop:
    def test_requests_are_sent_whether_or_not_earlier_ones_have_ended(self):
        async def run():
            target = HeldTarget(num_held=12)
            return target, await run_open(target, [single()] * 12, [0.0] * 12)

        target, timings = asyncio.run(run())
        assert target.most_live == 12
        assert all(timing.failure is None for timing in timings)

    def test_latency_counts_from_when_a_request_was_due(self):
        async def run():
            target = HeldTarget()
            arrivals_s = [0.0, 0.0, 0.0]
            sessions = [single()] * 3
            return target, await run_open(target, sessions, arrivals_s, max_outstanding=1)

        target, timings = asyncio.run(run())
        assert target.most_live == 1
        first, second, third = timings
        assert [timing.started_s for timing in timings] == [0.0, 0.0, 0.0]
        # The second waits for the first, and all of its wait is in its figures.
        assert second.send_delay_s >= first.end_s
        assert second.ttft_s > second.send_delay_s
        assert third.send_delay_s >= second.end_s
        assert third.e2e_s > second.e2e_s > first.e2e_s

    def test_nothing_is_sent_before_it_is_due(self):
        async def run():
            return await run_open(HeldTarget(), [single()] * 3, [0.0, 0.03, 0.06])

        timings = asyncio.run(run())
        assert [timing.started_s for timing in timings] == [0.0, 0.03, 0.06]
        assert all(timing.send_delay_s >= 0 for timing in timings)
        assert all(timing.ttft_s > 0 for timing in timings)

    @pytest.mark.parametrize(
        ("arrivals_s", "limit", "message"),
        [([0.0], None, "2 sessions came with 1 arrivals"), ([0.0, 0.0], 0, "at least 1")],
    )
    def test_arguments_that_do_not_fit_are_refused(self, arrivals_s, limit, message):
        async def run():
            await run_open(HeldTarget(), [single()] * 2, arrivals_s, max_outstanding=limit)

        with pytest.raises(ValueError, match=message):
            asyncio.run(run())


class TestClosedLoop:
    def test_no_more_users_than_asked_and_all_of_them_busy(self):
        async def run():
            target = HeldTarget(num_held=3)
            return target, await run_closed(target, [single()] * 9, 3)

        target, timings = asyncio.run(run())
        assert target.most_live == 3
        assert len(timings) == 9

    def test_turns_resend_what_was_said_and_wait_for_their_pause(self):
        turns = [LoadRequest([1, 2], PARAMS), LoadRequest([3], PARAMS, 0.02)]

        async def run():
            target = HeldTarget()
            return target, await run_closed(target, [Session(turns)], 1)

        target, (first, second) = asyncio.run(run())
        assert target.prompts == [[1, 2], [1, 2, 7, 8, 9, 3]]
        assert second.started_s == pytest.approx(first.end_s + 0.02)
        assert (first.num_output_tokens, first.num_first_tokens, len(first.itl_s)) == (3, 1, 2)
        assert (first.num_prompt_tokens, first.num_cached_tokens) == (5, 4)

    def test_a_turn_that_fails_ends_its_session_only(self):
        turns = [LoadRequest([1], PARAMS)] * 3
        timings = asyncio.run(run_closed(FailingTarget(), [Session(turns), Session(turns)], 1))
        assert [timing.failure is None for timing in timings] == [True, False, True, True, True]
        assert LoadReport.of(timings).refusals == {"FULL": 1}

    def test_on_done_sees_each_request_as_it_ends(self):
        seen = []
        timings = asyncio.run(run_closed(FailingTarget(), [single()] * 3, 1, on_done=seen.append))
        assert seen == timings

    def test_concurrency_below_one_is_refused(self):
        with pytest.raises(ValueError, match="at least 1"):
            asyncio.run(run_closed(HeldTarget(), [single()], 0))


class TestGrpc:
    @pytest.fixture
    def run(self, server):
        def run(requests, concurrency):
            async def measure():
                async with AsyncClient(server.address) as client:
                    return await run_load(GrpcTarget(client), requests, concurrency)

            return asyncio.run(measure())

        return run

    def test_timings_come_in_the_order_of_the_requests(self, run):
        requests = [LoadRequest("a " * count, PARAMS) for count in (5, 1, 3)]
        timings = run(requests, 2)
        assert [timing.num_output_tokens for timing in timings] == [5, 1, 3]
        assert [len(timing.itl_s) for timing in timings] == [4, 0, 2]
        for timing in timings:
            assert timing.num_prompt_tokens == timing.num_output_tokens
            assert timing.num_cached_tokens == 1
            assert 0 < timing.ttft_s <= timing.e2e_s
            assert timing.ttft_s + sum(timing.itl_s) <= timing.e2e_s

    def test_failed_request_does_not_end_the_run(self, run, server):
        server.service.errors.append(error_status(code_pb2.INTERNAL, "it broke"))
        report = LoadReport.of(run([LoadRequest("a", PARAMS)] * 3, 1))
        assert report.errors == ("ServerError: INTERNAL: it broke",)
        assert (report.num_requests, report.num_failed, report.num_output_tokens) == (3, 1, 2)
        assert report.failures == {"INTERNAL": 1}

    @pytest.mark.parametrize(
        ("status", "code"),
        [
            (overloaded(0.5), "RESOURCE_EXHAUSTED"),
            (error_status(code_pb2.INVALID_ARGUMENT, "no"), "INVALID_ARGUMENT"),
        ],
    )
    def test_a_request_that_the_server_turns_down_is_a_refusal(self, run, server, status, code):
        server.service.errors.append(status)
        report = LoadReport.of(run([LoadRequest("a", PARAMS)] * 2, 1))
        assert (report.num_refused, report.num_failed) == (1, 0)
        assert report.refusals == {code: 1}

    def test_requests_carry_the_salt_of_their_run(self, server):
        async def measure():
            async with AsyncClient(server.address) as client:
                target = GrpcTarget(client, cache_salt="run 1")
                await run_load(target, [LoadRequest("a", PARAMS)], 1)

        asyncio.run(measure())
        assert [request.cache_salt for request in server.service.requests] == ["run 1"]

    def test_a_stream_without_its_end_is_a_failure(self, run, server):
        server.service.cut_short = True
        (timing,) = run([LoadRequest("a b", PARAMS)], 1)
        assert timing.failure.code == "CUT SHORT"
        assert timing.num_output_tokens == 2

    def test_an_answer_that_the_server_aborts_is_a_failure(self, run, server):
        server.service.finish_reason = FINISH_REASON_ABORT
        (timing,) = run([LoadRequest("a b", PARAMS)], 1)
        assert timing.failure.code == "ABORT"
        assert not timing.failure.is_refusal
