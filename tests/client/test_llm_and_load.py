"""The offline API and the load generator against a scripted server."""

import asyncio
import contextlib
import time

import pytest
from google.rpc import code_pb2

from nanovllm import LLM, AsyncClient, Client, SamplingParams
from nanovllm.errors import ServerError, UnavailableError
from nanovllm.llm import executor_arguments
from nanovllm.load import LoadReport, LoadRequest, Percentiles, RequestTiming, run_load
from tests.client.fake_server import FakeServer, error_status, overloaded


@pytest.fixture
def llm(server):
    with LLM(address=server.address) as model:
        yield model


class TestLLM:
    def test_outputs_come_in_the_order_of_the_prompts(self, llm):
        prompts = ["a b c d e f", [3, 4], {"prompt_token_ids": [5]}, {"prompt": "x y"}]
        outputs = llm.generate(prompts, use_tqdm=False)
        assert [output.text for output in outputs] == ["abcdef", "34", "5", "xy"]
        assert outputs[1].prompt_token_ids == [3, 4]
        assert outputs[0].finish_reason == "stop"
        assert outputs[0].num_cached_tokens == 1

    @pytest.mark.parametrize("prompt", ["a b", [1, 2], {"prompt_token_ids": [1, 2]}])
    def test_single_prompt_is_a_list_of_one(self, llm, prompt):
        (output,) = llm.generate(prompt, use_tqdm=False)
        assert output.num_prompt_tokens == 2

    def test_no_prompts_are_no_outputs(self, llm):
        assert llm.generate([], use_tqdm=False) == []

    def test_each_prompt_can_have_its_own_parameters(self, llm, server):
        llm.generate(["a", "b"], [SamplingParams(n=1), SamplingParams(n=2)], use_tqdm=False)
        sent = {r.text: r.sampling_params.n for r in server.service.requests}
        assert sent == {"a": 1, "b": 2}

    def test_unequal_numbers_of_prompts_and_parameters_are_refused(self, llm):
        with pytest.raises(ValueError, match="2 prompts came with 1"):
            llm.generate(["a", "b"], [SamplingParams()], use_tqdm=False)

    def test_chat_takes_one_or_many_conversations(self, llm, server):
        def message(text: str) -> dict[str, str]:
            return {"role": "user", "content": text}

        (one,) = llm.chat([message("a b")], chat_template_kwargs={"x": 1}, use_tqdm=False)
        assert one.text == "ab"
        assert server.service.requests[-1].chat.template_kwargs_json == '{"x": 1}'
        both = llm.chat([[message("c")], [message("d")]], use_tqdm=False)
        assert [output.text for output in both] == ["c", "d"]

    def test_refusal_for_a_full_queue_is_tried_again(self, llm, server):
        server.service.errors += [overloaded(0.01), overloaded(0.01)]
        outputs = llm.generate(["a", "b"], use_tqdm=False)
        assert [output.text for output in outputs] == ["a", "b"]
        assert len(server.service.requests) == 4

    def test_failure_of_one_request_is_raised(self, llm, server):
        server.service.errors.append(error_status(code_pb2.INTERNAL, "it broke"))
        with pytest.raises(ServerError, match="it broke"):
            llm.generate(["a", "b"], use_tqdm=False)
        (output,) = llm.generate("c", use_tqdm=False)
        assert output.text == "c"

    def test_progress_bar_shows_the_rate(self, llm, capsys):
        llm.generate(["a b c"])
        assert "tok/s" in capsys.readouterr().err

    def test_works_where_an_event_loop_runs(self, llm):
        async def caller() -> str:
            return llm.generate("a", use_tqdm=False)[0].text

        assert asyncio.run(caller()) == "a"

    def test_closing_twice_is_harmless(self, server):
        model = LLM(address=server.address)
        model.close()
        model.close()

    def test_running_server_takes_no_engine_options(self):
        with pytest.raises(TypeError, match="leave out model and dtype"):
            LLM(address="unix:/x", dtype="float32")

    def test_engine_options_become_executor_arguments(self):
        options = {"max_model_len": 8, "enforce_eager": True, "dtype": None, "x": False}
        assert executor_arguments(options) == ["--max-model-len", "8", "--enforce-eager"]


class TestLoad:
    @pytest.fixture
    def run(self, server):
        def run(requests, concurrency):
            async def measure():
                async with AsyncClient(server.address) as client:
                    return await run_load(client, requests, concurrency)

            return asyncio.run(measure())

        return run

    def test_timings_come_in_the_order_of_the_requests(self, run):
        requests = [LoadRequest("a " * count, SamplingParams()) for count in (5, 1, 3)]
        timings = run(requests, 2)
        assert [timing.num_output_tokens for timing in timings] == [5, 1, 3]
        assert [len(timing.itl_s) for timing in timings] == [4, 0, 2]
        for timing in timings:
            assert timing.ttft_s is not None
            assert 0 < timing.ttft_s <= timing.e2e_s
            assert timing.ttft_s + sum(timing.itl_s) <= timing.e2e_s

    def test_failed_request_does_not_end_the_run(self, run, server):
        server.service.errors.append(error_status(code_pb2.INTERNAL, "it broke"))
        timings = run([LoadRequest("a", SamplingParams())] * 3, 1)
        assert [timing.error for timing in timings] == [
            "ServerError: INTERNAL: it broke",
            None,
            None,
        ]
        report = LoadReport.of(timings)
        assert (report.num_requests, report.num_failed, report.num_output_tokens) == (3, 1, 2)

    def test_concurrency_below_one_is_refused(self, run):
        with pytest.raises(ValueError, match="at least 1"):
            run([LoadRequest("a", SamplingParams())], 0)

    def test_throughput_is_over_the_whole_run(self):
        timings = [
            RequestTiming(0.5, ttft_s=0.1, e2e_s=1.0, num_output_tokens=10),
            RequestTiming(1.0, ttft_s=0.3, e2e_s=1.5, num_output_tokens=30),
        ]
        report = LoadReport.of(timings)
        assert report.duration_s == 2.0
        assert report.output_tokens_per_s == 20.0
        assert report.ttft_s == Percentiles(0.2, 0.2, pytest.approx(0.29), pytest.approx(0.298))
        assert report.itl_s is None

    def test_report_of_nothing_is_empty(self):
        report = LoadReport.of([])
        assert (report.duration_s, report.output_tokens_per_s, report.e2e_s) == (0.0, 0.0, None)


def test_client_finds_a_server_that_came_back(server):
    with Client(server.address) as client:
        assert client.generate("a").text == "a"
        server.stop()
        with pytest.raises(UnavailableError):
            client.generate("b")
        again = FakeServer.start(server.address)
        try:
            deadline_s = time.monotonic() + 10
            text = None
            while text is None and time.monotonic() < deadline_s:
                # Until the channel's short back-off has passed, calls still fail at once.
                with contextlib.suppress(UnavailableError):
                    text = client.generate("c").text
            assert text == "c"
        finally:
            again.stop()
