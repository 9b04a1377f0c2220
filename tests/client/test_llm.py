"""The offline API against a scripted server."""

import asyncio
import contextlib
import time
from typing import ClassVar

import pytest
from google.rpc import code_pb2

from nanovllm import LLM, Client, SamplingParams
from nanovllm.errors import ServerError, UnavailableError
from nanovllm.llm import executor_arguments
from tests.client.fake_server import FakeServer, error_status, overloaded


@pytest.fixture
def llm(server):
    with LLM(address=server.address) as model:
        yield model


class FakeServices:
    """In the place of LocalServices: keeps what it was asked for, and has the fake server."""

    address = ""
    options: ClassVar[dict] = {}

    def __init__(self, model: str, **options) -> None:
        self.options.update(options)

    def start(self) -> "FakeServices":
        return self

    def close(self) -> None:
        pass


@pytest.mark.parametrize("chosen", [None, "debug"])
def test_own_services_do_not_log_a_line_for_each_prompt_unless_asked_to(
    server, monkeypatch: pytest.MonkeyPatch, chosen: str | None
):
    name = "NANOVLLM_SCHEDULER_LOG_LEVEL"
    monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv(name, chosen)
    monkeypatch.setattr(FakeServices, "address", server.address)
    monkeypatch.setattr("nanovllm.llm.LocalServices", FakeServices)
    with LLM("a model"):
        assert FakeServices.options["env"][name] == (chosen or "warning")


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
