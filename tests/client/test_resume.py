"""Requests that outlive their stream: the pure part, and both clients against scripted servers."""

import asyncio
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from nanovllm import AsyncClient, Client, RequestOutput, ResumePolicy, SamplingParams
from nanovllm.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    NanovllmError,
    OverloadedError,
    RequestCancelledError,
    ServerError,
    UnavailableError,
)
from nanovllm.requests import generate_request
from nanovllm.resume import ResumableRequest, Server, resume_policy
from nanovllm.v1 import inference_pb2 as pb
from nanovllm.v1 import inference_pb2_grpc as pb_grpc
from tests.client.fake_server import overloaded

INFO = pb.ResumeInfo(prompt_token_ids=[4, 5, 6], model_fingerprint="f" * 64)
LIMIT_S = 30.0
FAST = ResumePolicy(max_wait_s=20.0, initial_backoff_s=0.001, max_backoff_s=0.01)
GONE = UnavailableError("gone", grpc.StatusCode.UNAVAILABLE)


def delta(text: str, index: int = 0, *, end: bool = False, info: bool = False):
    return pb.GenerateResponse(
        index=index,
        text=text,
        token_ids=list(text.encode()),
        finish_reason=pb.FINISH_REASON_LENGTH if end else pb.FINISH_REASON_UNSPECIFIED,
        usage=pb.Usage(prompt_tokens=3, completion_tokens=9) if end else None,
        resume_info=INFO if info else None,
    )


class TestResumableRequest:
    @staticmethod
    def make(prompt: Any = "abc", policy: ResumePolicy = FAST, **options: Any) -> ResumableRequest:
        params = options.pop("params", SamplingParams(max_tokens=9, n=2))
        return ResumableRequest(
            generate_request(prompt, params, request_id="mine"),
            policy,
            rng=random.Random(0),
            **options,
        )

    def test_the_first_attempt_is_the_request_with_a_key_and_a_seed_that_stay(self):
        request = self.make()
        first, second = request.message(), request.message()
        assert first == second
        assert first.resume.key
        assert first.sampling_params.HasField("seed")
        assert not first.resume.completions
        assert first.text == "abc"
        assert self.make().message().resume.key != first.resume.key
        seeded = self.make(params=SamplingParams(seed=0))
        assert seeded.message().sampling_params.seed == 0

    def test_a_later_attempt_says_what_was_received_of_each_completion(self):
        request = self.make()
        for response in (
            delta("a\u20ac", info=True),
            delta("x", 1),
            delta("b", 0),
            delta("y", 1, end=True),
        ):
            request.receive(response)
        message = request.message()
        assert list(message.token_ids.ids) == [4, 5, 6]
        assert message.resume.model_fingerprint == "f" * 64
        first, second = message.resume.completions
        assert list(first.token_ids) == list("a\u20acb".encode())
        # Code points, not bytes.
        assert (first.index, first.num_text_chars, first.is_finished) == (0, 3, False)
        assert (second.index, list(second.token_ids), second.is_finished) == (1, [], True)
        assert not request.is_complete
        request.receive(delta("", 0, end=True))
        assert request.is_complete

    def test_a_prompt_of_ids_is_kept(self):
        request = self.make([1, 2])
        request.receive(delta("a", info=True))
        assert list(request.message().token_ids.ids) == [1, 2]

    def test_pauses_double_up_to_the_limit_with_jitter_and_start_anew_with_a_response(self):
        request = self.make(policy=ResumePolicy(initial_backoff_s=0.1, max_backoff_s=1.0))
        pauses = [request.pause_s(GONE, 0.0) for _ in range(6)]
        for pause_s, most_s in zip(pauses, (0.1, 0.2, 0.4, 0.8, 1.0, 1.0), strict=True):
            assert most_s / 2 <= pause_s <= most_s
        assert len(set(pauses)) == len(pauses)
        request.receive(delta("a", info=True))
        assert request.pause_s(GONE, 0.0) <= 0.1

    def test_without_any_response_for_too_long_the_last_error_is_raised(self):
        request = self.make(policy=ResumePolicy(max_wait_s=5.0))
        request.pause_s(GONE, 100.0)
        request.pause_s(GONE, 105.0)
        with pytest.raises(UnavailableError):
            request.pause_s(GONE, 105.1)
        request.receive(delta("a", info=True))
        request.pause_s(GONE, 1000.0)

    def test_no_attempt_begins_after_the_deadline(self):
        request = self.make(deadline_s=10.0)
        assert request.remaining_s(4.0) == 6.0
        request.pause_s(GONE, 9.0)
        with pytest.raises(DeadlineExceededError, match="gone") as caught:
            request.pause_s(GONE, 9.9999)
        assert caught.value.__cause__ is GONE
        assert request.remaining_s(11.0) == 0.0

    @pytest.mark.parametrize(
        "error",
        [
            ServerError("bug", grpc.StatusCode.INTERNAL),
            InvalidRequestError("top_p", grpc.StatusCode.INVALID_ARGUMENT),
            DeadlineExceededError("late", grpc.StatusCode.DEADLINE_EXCEEDED),
        ],
    )
    def test_an_error_that_another_attempt_would_not_change_is_raised(self, error: NanovllmError):
        request = self.make(num_servers=2)
        request.receive(delta("a", info=True))
        with pytest.raises(type(error)):
            request.pause_s(error, 0.0)

    def test_a_full_queue_is_the_callers_business_unless_the_request_had_begun(self):
        full = OverloadedError("full", grpc.StatusCode.RESOURCE_EXHAUSTED, 3.0)
        request = self.make()
        with pytest.raises(OverloadedError):
            request.pause_s(full, 0.0)
        request.receive(delta("a", info=True))
        assert request.pause_s(full, 0.0) == 3.0

    def test_a_server_that_does_not_know_resuming_is_not_asked_to(self):
        request = self.make()
        request.receive(delta("a"))
        with pytest.raises(UnavailableError):
            request.pause_s(GONE, 0.0)

    def test_the_server_that_failed_least_is_chosen(self):
        servers = [Server("a", lambda *_: None), Server("b", lambda *_: None)]
        request = self.make(num_servers=2)
        assert request.choose(servers).address == "a"
        request.pause_s(GONE, 0.0)
        assert request.choose(servers).address == "b"
        request.receive(delta("a", info=True))
        assert request.choose(servers).address == "b"

    def test_a_policy_or_a_truth_value_says_whether_to_resume(self):
        assert resume_policy(False) is None
        assert resume_policy(True) == ResumePolicy()
        assert resume_policy(FAST) is FAST
        with pytest.raises(ValueError, match="initial_backoff_s"):
            ResumePolicy(initial_backoff_s=2.0, max_backoff_s=1.0)


class ScriptedService(pb_grpc.InferenceServiceServicer):
    """Answers the i-th call with the i-th script: responses, then the status that ends the call."""

    def __init__(self, *scripts: Sequence[Any]) -> None:
        self.scripts = list(scripts)
        self.requests: list[pb.GenerateRequest] = []
        self.called = threading.Event()

    def Generate(self, request, context) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        self.requests.append(request)
        self.called.set()
        for item in self.scripts.pop(0):
            if isinstance(item, pb.GenerateResponse):
                yield item
            elif isinstance(item, grpc.StatusCode):
                context.abort(item, "scripted")
            else:
                context.abort_with_status(rpc_status.to_status(item))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., tuple[ScriptedService, str]]]:
    servers = []

    def start(*scripts: Sequence[Any]) -> tuple[ScriptedService, str]:
        service = ScriptedService(*scripts)
        server = grpc.server(ThreadPoolExecutor(4))
        pb_grpc.add_InferenceServiceServicer_to_server(service, server)
        address = f"unix:{tmp_path}/{len(servers)}.sock"
        server.add_insecure_port(address)
        server.start()
        servers.append(server)
        return service, address

    yield start
    for server in servers:
        server.stop(None).wait()


@pytest.fixture(params=["sync", "asyncio"])
def generate(request: pytest.FixtureRequest) -> Callable[..., RequestOutput]:
    def run(address: str, *, n: int = 1, resume: Any = FAST, **options: Any) -> RequestOutput:
        params = SamplingParams(max_tokens=9, n=n)
        call_options = {"timeout_s": options.pop("timeout_s", LIMIT_S)}
        if request.param == "sync":
            with Client(address, resume=resume, **options) as client:
                return client.generate("abc", params, **call_options)

        async def main() -> RequestOutput:
            async with AsyncClient(address, resume=resume, **options) as client:
                return await client.generate("abc", params, **call_options)

        return asyncio.run(main())

    return run


UNAVAILABLE, CANCELLED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED


class TestClients:
    def test_a_broken_stream_goes_on_where_it_was(self, serve, generate):
        service, address = serve(
            [UNAVAILABLE],
            [delta("ab", info=True), UNAVAILABLE],
            [CANCELLED],
            [delta("cd"), UNAVAILABLE],
            [overloaded(0.001)],
            [delta("e", end=True)],
        )
        output = generate(address)
        assert output.text == "abcde"
        assert bytes(output.token_ids) == b"abcde"
        received = [
            bytes(request.resume.completions[0].token_ids)
            for request in service.requests
            if request.resume.completions
        ]
        assert received == [b"ab", b"ab", b"abcd", b"abcd"]
        assert len({request.resume.key for request in service.requests}) == 1
        assert len({request.sampling_params.seed for request in service.requests}) == 1
        assert len({request.request_id for request in service.requests}) == 1

    def test_a_stream_that_breaks_after_its_last_delta_is_complete(self, serve, generate):
        service, address = serve([delta("a", info=True), delta("b", end=True), UNAVAILABLE])
        assert generate(address).text == "ab"
        assert len(service.requests) == 1

    def test_without_resume_the_error_is_raised(self, serve, generate):
        service, address = serve([delta("ab"), UNAVAILABLE])
        with pytest.raises(UnavailableError):
            generate(address, resume=False)
        assert not service.requests[0].HasField("resume")

    def test_another_address_takes_over(self, serve, generate, tmp_path: Path):
        first, first_address = serve([delta("ab", info=True), UNAVAILABLE])
        second, second_address = serve([delta("c", end=True)])
        nobody = f"unix:{tmp_path}/nobody.sock"
        output = generate(nobody, addresses=[first_address, second_address])
        assert output.text == "abc"
        assert len(first.requests) == len(second.requests) == 1

    def test_the_callers_deadline_holds_over_all_attempts(self, serve, generate, tmp_path: Path):
        with pytest.raises(DeadlineExceededError):
            generate(f"unix:{tmp_path}/nobody.sock", timeout_s=0.2)

    def test_attempts_are_bounded_in_time(self, serve, generate, tmp_path: Path):
        policy = ResumePolicy(max_wait_s=0.1, initial_backoff_s=0.01, max_backoff_s=0.02)
        with pytest.raises(UnavailableError):
            generate(f"unix:{tmp_path}/nobody.sock", resume=policy)

    def test_a_call_can_resume_although_its_client_does_not(self, serve):
        _, address = serve([delta("ab", info=True), UNAVAILABLE], [delta("c", end=True)])
        with Client(address) as client, client.stream("abc", resume=FAST) as stream:
            assert "".join(item.text for item in stream) == "abc"
            assert stream.num_resumes == 1

    def test_closing_a_stream_ends_its_wait_for_the_next_attempt(self, serve):
        service, address = serve([delta("a", info=True), UNAVAILABLE])
        patient = ResumePolicy(initial_backoff_s=LIMIT_S, max_backoff_s=LIMIT_S)
        with Client(address) as client, ThreadPoolExecutor(1) as threads:
            stream = client.stream("abc", resume=patient)
            assert next(stream).text == "a"
            reading = threads.submit(next, stream)
            stream.close()
            error = reading.exception(LIMIT_S / 2)
        assert isinstance(error, (UnavailableError, RequestCancelledError))
        assert len(service.requests) == 1
