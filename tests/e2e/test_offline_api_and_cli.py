"""The offline API and the command line tool over real services."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanovllm import LLM, Client, FinishReason, LocalServices, SamplingParams
from nanovllm.requests import Prompt
from tests.e2e.support import (
    LIMIT_S,
    Reference,
    greedy,
    random_prompt,
    running_services,
    wait_until,
    wait_until_idle,
)


@pytest.fixture(scope="module")
def llm(checkpoint: Callable[[str], Path]) -> Iterator[LLM]:
    with LLM(str(checkpoint("llama")), device="cpu", dtype="float32", num_kv_blocks=256) as model:
        yield model


class TestOfflineApi:
    def test_outputs_come_in_the_order_of_the_prompts(
        self, llm: LLM, reference: Callable[[str], Reference]
    ) -> None:
        prompts = [random_prompt(5 + 7 * index, seed=160 + index) for index in range(12)]
        counts = [20 - index for index in range(12)]
        outputs = llm.generate(prompts, [greedy(count) for count in counts], use_tqdm=False)
        for prompt, count, output in zip(prompts, counts, outputs, strict=True):
            assert output.prompt_token_ids == prompt
            assert output.num_prompt_tokens == len(prompt)
            assert output.token_ids == reference("llama").greedy(prompt, count)
            assert output.finish_reason is FinishReason.LENGTH

    def test_texts_ids_and_dictionaries_are_all_prompts(self, llm: LLM) -> None:
        params = greedy(6)
        ids = [72, 105]
        prompts: list[Prompt] = [{"prompt_token_ids": ids}, ids, "Hi", {"prompt": "Hi"}]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert outputs[0].token_ids == outputs[1].token_ids
        assert outputs[2].token_ids == outputs[3].token_ids
        (one,) = llm.generate("Hi", params, use_tqdm=False)
        assert (one.text, one.token_ids) == (outputs[2].text, outputs[2].token_ids)

    def test_shared_prefixes_are_reported(self, llm: LLM) -> None:
        prompt = random_prompt(64, seed=180)
        llm.generate([prompt], greedy(1), use_tqdm=False)
        (output,) = llm.generate([prompt + [1]], greedy(1), use_tqdm=False)
        assert output.num_cached_tokens == 64

    def test_chat_answers_each_conversation(self, llm: LLM) -> None:
        hello = [{"role": "user", "content": "hello"}]
        other = [{"role": "user", "content": "other"}]
        one, two = llm.chat([hello, other], greedy(8), use_tqdm=False)
        assert one.token_ids != two.token_ids
        (again,) = llm.chat(hello, greedy(8), use_tqdm=False)
        assert again.token_ids == one.token_ids

    def test_bad_parameter_is_an_error_that_names_it(self, llm: LLM) -> None:
        with pytest.raises(ValueError, match=r"sampling_params\.top_p"):
            llm.generate(["a", "b"], SamplingParams(top_p=3.0), use_tqdm=False)
        assert llm.generate("a", greedy(1), use_tqdm=False)[0].token_ids

    def test_running_server_can_be_used_instead(self, services: LocalServices) -> None:
        with Client(services.address) as client:
            expected = client.generate("abc", greedy(8)).token_ids
        with LLM(address=services.address) as llm:
            assert llm.generate("abc", greedy(8), use_tqdm=False)[0].token_ids == expected
        assert services.scheduler.running


def command(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "nanovllm", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(*arguments: str) -> str:
    """Runs a command that must succeed; returns what it wrote to stdout."""
    process = command(*arguments)
    stdout, stderr = process.communicate(timeout=4 * LIMIT_S)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr
    return stdout


class TestCommandLine:
    def test_generate_streams_the_text(self, client: Client) -> None:
        expected = client.generate("abc", greedy(12))
        limits = ("--temperature", "0", "--max-tokens", "12", "--ignore-eos")
        address = ("--address", client.address)
        document = json.loads(output_of("generate", "abc", *limits, *address, "--json"))
        assert document["completions"][0]["token_ids"] == expected.token_ids
        assert document["completions"][0]["text"] == expected.text
        assert document["completions"][0]["usage"]["completion_tokens"] == 12

    def test_refused_request_is_one_line_and_status_one(self, client: Client) -> None:
        process = command("generate", "abc", "--top-p", "7", "--address", client.address)
        stdout, stderr = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 1
        assert stdout == ""
        (line,) = stderr.splitlines()
        assert line.startswith("nanovllm: sampling_params.top_p: must be in (0, 1]")

    def test_info_describes_the_server(self, client: Client) -> None:
        document = json.loads(output_of("info", "--json", "--address", client.address))
        assert document["health"] == "serving"
        assert document["model"]["model_name"] == "tiny-qwen3"
        assert document["status"]["executor"]["device"] == "cpu"

    def test_bench_reports_every_token(self, client: Client, tmp_path: Path) -> None:
        report_path = tmp_path / "report.json"
        sizes = ("--num-requests", "12", "--concurrency", "4")
        lengths = ("--input-len", "30", "--output-len", "10", "--json", str(report_path))
        output_of("bench", *sizes, *lengths, "--address", client.address)
        report = json.loads(report_path.read_text())["report"]
        assert report["num_failed"] == 0
        assert report["num_prompt_tokens"] == 12 * 30
        assert report["num_output_tokens"] == 12 * 10
        assert 0 < report["ttft_s"]["p50"] < report["e2e_s"]["p50"]

    def test_killed_client_process_frees_what_its_request_held(self, client: Client) -> None:
        process = command(
            *("generate", "abc", "--ignore-eos", "--max-tokens", "4000"),
            *("--address", client.address),
        )
        with process:
            wait_until(lambda: client.server_status().num_running == 1, "the request runs")
            process.kill()
            process.communicate(timeout=LIMIT_S)
        wait_until_idle(client, limit_s=5.0)

    def test_demo_streams_an_answer_and_stops_both_services(
        self, checkpoint: Callable[[str], Path]
    ) -> None:
        text = output_of("demo", "--model", str(checkpoint("qwen3")), "--max-tokens", "20")
        assert "time to first token" in text
        assert "/metrics" in text
        assert "both services stopped cleanly" in text


def mapped_libraries(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_scheduler_never_loads_torch(client: Client, services: LocalServices) -> None:
    chat = [{"role": "user", "content": "hello"}]
    client.generate(chat, greedy(4, logprobs=3, stop="never"))
    client.detokenize(client.tokenize(chat))
    # The executor shows that the search finds what it looks for.
    assert "libtorch" in mapped_libraries(services.executor.pid)
    assert "libtorch" not in mapped_libraries(services.scheduler.pid)


def test_default_dtype_is_that_of_the_checkpoint(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    (weights,) = checkpoint("qwen3").glob("*.safetensors")
    assert next(iter(load_file(weights).values())).dtype is torch.float32
    with (
        running_services(
            checkpoint("qwen3"), tmp_path, executor=["--dtype", "auto", "--num-kv-blocks", "32"]
        ) as services,
        Client(services.address) as client,
    ):
        executor = client.server_status().executor
        assert executor is not None
        assert executor.dtype == "float32"
