"""The command `nanovllm`: what it prints and how it exits."""

import io
import json
import subprocess
import sys

import pytest
from google.rpc import code_pb2

from nanovllm.cli import main
from nanovllm.v1.inference_pb2 import FINISH_REASON_ABORT
from tests.client.fake_server import error_status


def run(server, *arguments: str) -> int:
    return main([*arguments, "--address", server.address])


class TestGenerate:
    def test_text_goes_to_stdout(self, server, capsys):
        assert run(server, "generate", "a b", "--max-tokens", "3", "--stop", "x") == 0
        assert capsys.readouterr().out == "ab\n"
        params = server.service.requests[-1].sampling_params
        assert params.max_tokens == 3
        assert list(params.stop) == ["x"]
        assert not params.HasField("temperature")
        assert not params.HasField("ignore_eos")

    def test_prompt_comes_from_stdin_without_an_argument(self, server, capsys, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.StringIO("c d"))
        assert run(server, "generate") == 0
        assert capsys.readouterr().out == "cd\n"

    def test_system_message_makes_it_a_chat(self, server):
        run(server, "generate", "hi", "--system", "be brief")
        messages = server.service.requests[-1].chat.messages
        assert [(m.role, m.content) for m in messages] == [("system", "be brief"), ("user", "hi")]

    def test_json_holds_every_completion(self, server, capsys):
        assert run(server, "generate", "a b", "--json", "--n", "2") == 0
        document = json.loads(capsys.readouterr().out)
        assert [c["text"] for c in document["completions"]] == ["ab", "a1b1"]
        assert document["completions"][0]["finish_reason"] == "stop"

    def test_several_completions_without_json_are_wrong_usage(self, server, capsys):
        with pytest.raises(SystemExit) as caught:
            run(server, "generate", "a", "--n", "2")
        assert caught.value.code == 2
        assert "need --json" in capsys.readouterr().err

    def test_refused_request_is_one_line_and_status_one(self, server, capsys):
        server.service.errors.append(error_status(code_pb2.INVALID_ARGUMENT, "top_p is too high"))
        assert run(server, "generate", "a", "--top-p", "2") == 1
        assert capsys.readouterr().err == "nanovllm: top_p is too high\n"

    def test_number_too_large_for_the_wire_is_one_line(self, server, capsys):
        assert run(server, "generate", "a", "--max-tokens", str(2**40)) == 1
        assert "max_tokens must fit" in capsys.readouterr().err

    def test_ctrl_c_is_status_130(self, server, monkeypatch):
        def interrupted() -> str:
            raise KeyboardInterrupt

        stdin = io.StringIO()
        monkeypatch.setattr(stdin, "read", interrupted, raising=False)
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run(server, "generate") == 130

    @pytest.mark.parametrize("address", ["localhost", "http://localhost:1"])
    def test_bad_address_is_wrong_usage(self, address, capsys):
        with pytest.raises(SystemExit) as caught:
            main(["generate", "a", "--address", address])
        assert caught.value.code == 2
        assert "HOST:PORT" in capsys.readouterr().err


class TestChat:
    def chat(self, server, monkeypatch, text: str, *arguments: str) -> int:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return run(server, "chat", *arguments)

    def test_history_grows_and_reset_forgets_it(self, server, monkeypatch, capsys):
        assert self.chat(server, monkeypatch, "a b\n\nc\n/reset\nd\n", "--system", "s") == 0
        assert capsys.readouterr().out == "ab\nc\nd\n"
        sent = [[m.content for m in r.chat.messages] for r in server.service.requests]
        assert sent == [["s", "a b"], ["s", "a b", "ab", "c"], ["s", "d"]]

    def test_exit_ends_it(self, server, monkeypatch):
        assert self.chat(server, monkeypatch, "/exit\na\n") == 0
        assert not server.service.requests

    def test_unknown_command_is_not_sent(self, server, monkeypatch, capsys):
        assert self.chat(server, monkeypatch, "/quit\n") == 0
        assert "unknown command /quit" in capsys.readouterr().err
        assert not server.service.requests

    def test_model_without_chat_template_is_refused(self, server, monkeypatch, capsys):
        server.service.has_chat_template = False
        assert self.chat(server, monkeypatch, "a\n") == 1
        assert "no chat template" in capsys.readouterr().err

    def test_answer_aborted_on_the_server_is_status_one(self, server, monkeypatch, capsys):
        server.service.finish_reason = FINISH_REASON_ABORT
        assert self.chat(server, monkeypatch, "a\n") == 1
        assert capsys.readouterr().err == "nanovllm: the request was aborted on the server\n"

    def test_error_ends_a_piped_chat_with_status_one(self, server, monkeypatch, capsys):
        server.service.errors.append(error_status(code_pb2.INTERNAL, "it broke"))
        assert self.chat(server, monkeypatch, "a\nb\n") == 1
        assert capsys.readouterr().err == "nanovllm: INTERNAL: it broke\n"


class TestBench:
    def test_report_counts_every_token(self, server, capsys, tmp_path):
        path = tmp_path / "report.json"
        options = ["--num-requests", "6", "--concurrency", "2", "--input-len", "4"]
        assert run(server, "bench", *options, "--output-len", "4", "--json", str(path)) == 0
        document = json.loads(path.read_text())
        assert document["workload"]["num_requests"] == 6
        assert document["report"]["num_output_tokens"] == 24
        assert document["report"]["num_prompt_tokens"] == 24
        assert document["report"]["ttft_s"]["p99"] > 0
        assert "6 (0 failed)" in capsys.readouterr().out
        assert server.service.most_live <= 2

    def test_prompts_depend_on_the_seed_alone(self, server):
        def prompts(seed: str) -> set[tuple[int, ...]]:
            server.service.requests.clear()
            sizes = ["--num-requests", "3", "--input-len", "4", "--output-len", "4"]
            run(server, "bench", *sizes, "--seed", seed)
            return {tuple(request.token_ids.ids) for request in server.service.requests}

        first = prompts("1")
        assert len(first) == 3
        assert prompts("1") == first
        assert prompts("2") != first

    def test_failed_requests_make_the_command_fail(self, server, capsys):
        server.service.errors.append(error_status(code_pb2.INTERNAL, "it broke"))
        assert run(server, "bench", "--prompt", "a", "--num-requests", "2") == 1
        assert "1 of 2 requests failed: ServerError" in capsys.readouterr().err

    def test_requests_longer_than_the_model_are_refused_before_sending(self, server, capsys):
        assert run(server, "bench", "--input-len", "60", "--output-len", "5") == 1
        assert "exceed the model's length of 64" in capsys.readouterr().err
        assert not server.service.requests


class TestInfo:
    def test_text_names_model_health_and_load(self, server, capsys):
        assert run(server, "info") == 0
        text = capsys.readouterr().out
        assert "health         serving" in text
        assert "fake (LlamaForCausalLM)" in text
        assert "1 running, 2 waiting" in text
        assert "temperature=0.5, top_k=20" in text

    def test_json_is_one_object(self, server, capsys):
        assert run(server, "info", "--json") == 0
        document = json.loads(capsys.readouterr().out)
        assert document["health"] == "serving"
        assert document["model"]["default_sampling_params"] == {"temperature": 0.5, "top_k": 20}
        assert document["status"]["executor"]["device"] == "cpu"

    def test_missing_server_is_one_line_and_status_one(self, capsys, tmp_path):
        assert main(["info", "--address", f"unix:{tmp_path}/none"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"nanovllm: unix:{tmp_path}/none is unavailable")


class TestModels:
    def test_list_says_what_is_cached(self, capsys, monkeypatch, tmp_path):
        monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path))
        assert main(["models"]) == 0
        assert "smollm2-135m-instruct  Apache-2.0  to fetch" in capsys.readouterr().out
        path = tmp_path / "embedded-v1" / "smollm2-135m-instruct"
        path.mkdir(parents=True)
        (path / "config.json").write_bytes(b" " * 2_000_000)
        assert main(["models", "list"]) == 0
        assert f"cached    2 MB in {path}" in capsys.readouterr().out

    def test_path_prints_nothing_but_the_directory(self, capsys, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").touch()
        assert main(["models", "path", str(tmp_path)]) == 0
        assert capsys.readouterr().out == f"{tmp_path}\n"

    def test_missing_model_is_one_line_and_status_one(self, capsys):
        assert main(["models", "fetch", "/no/such/model"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "'/no/such/model' does not exist" in line


def test_demo_of_a_missing_model_fails_without_a_traceback(capsys):
    assert main(["demo", "--model", "./missing"]) == 1
    captured = capsys.readouterr()
    assert "'./missing' does not exist" in captured.err
    assert "logs" not in captured.out


def test_command_is_required(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2


def test_reader_that_went_away_ends_the_command_quietly(server):
    command = [sys.executable, "-m", "nanovllm", "generate", "a b", "--address", server.address]
    server.service.go_on.clear()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(1) == b"a"
    process.stdout.close()
    server.service.go_on.set()
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(10) == 1
