"""The command `nanovllm`: what it prints and how it exits."""

import io
import json
import subprocess
import sys

import pytest
from google.rpc import code_pb2

from nanovllm.cli import main
from nanovllm.v1.inference_pb2 import FINISH_REASON_ABORT
from tests.client.fake_server import error_status, overloaded


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
    SMALL = ("--num-requests", "3", "--input-len", "4", "--output-len", "4")

    def document(self, server, tmp_path, *arguments: str) -> dict:
        """What --json writes."""
        path = tmp_path / "report.json"
        assert run(server, "bench", *arguments, "--json", str(path)) == 0
        return json.loads(path.read_text())

    def test_report_counts_every_token(self, server, capsys, tmp_path):
        options = ["--num-requests", "6", "--concurrency", "2", "--input-len", "4"]
        document = self.document(server, tmp_path, *options, "--output-len", "4")
        assert document["config"]["workload"]["num_sessions"] == 6
        assert document["report"]["num_output_tokens"] == 24
        assert document["report"]["num_prompt_tokens"] == 24
        assert document["report"]["prefix_hit_rate"] == 0.25
        assert document["report"]["ttft_s"]["p99"] > 0
        assert sum(point["num_ends"] for point in document["series"]) == 6
        assert len(document["requests"]) == 6
        output = capsys.readouterr().out
        assert "6 (0 refused, 0 failed)" in output
        assert "TTFT p50 (ms) by time of arrival" in output
        assert server.service.most_live <= 2

    def test_prompts_depend_on_the_seed_alone(self, server):
        def prompts(seed: str) -> set[tuple[int, ...]]:
            server.service.requests.clear()
            run(server, "bench", *self.SMALL, "--seed", seed)
            return {tuple(request.token_ids.ids) for request in server.service.requests}

        first = prompts("1")
        assert len(first) == 3
        assert prompts("1") == first
        assert prompts("2") != first

    def test_configuration_says_nothing_of_this_machine(self, server, tmp_path):
        document = self.document(server, tmp_path, *self.SMALL)
        text = json.dumps([document["target"], document["config"]])
        assert server.address not in text
        assert str(tmp_path) not in text

    def test_an_open_loop_has_its_arrivals_and_an_objective(self, server, tmp_path, capsys):
        options = [*self.SMALL, "--rate", "200", "--arrivals", "bursty", "--burstiness", "0.5"]
        options += ["--max-outstanding", "2", "--slo", "e2e=100s", "--no-plot"]
        document = self.document(server, tmp_path, *options)
        assert document["config"]["arrivals"] == {
            "kind": "bursty",
            "rate": 200.0,
            "burstiness": 0.5,
        }
        assert document["report"]["goodput"]["share"] == 1.0
        output = capsys.readouterr().out
        assert "100.0% (3 of 3) within E2E 100000 ms" in output
        assert "over time" not in output
        assert server.service.most_live <= 2

    def test_warm_up_requests_are_sent_and_not_counted(self, server, tmp_path):
        document = self.document(server, tmp_path, *self.SMALL, "--warmup", "2")
        assert document["report"]["num_requests"] == 3
        sent = [tuple(request.token_ids.ids) for request in server.service.requests]
        assert len(set(sent)) == 5

    def test_turns_resend_the_conversation_behind_a_common_prefix(self, server, tmp_path):
        options = ["--turns", "2", "--prefix-groups", "1", "--prefix-len", "5"]
        document = self.document(server, tmp_path, *self.SMALL, *options)
        assert document["report"]["num_requests"] == 6
        sent = [list(request.token_ids.ids) for request in server.service.requests]
        firsts = [ids for ids in sent if len(ids) == 9]
        assert len({tuple(ids[:5]) for ids in sent}) == 1
        # The fake server answers with as many ids as the prompt has, counted from 0.
        later = [ids for ids in sent if len(ids) == 22]
        assert len(firsts) == len(later) == 3
        for ids in later:
            assert ids[:9] in firsts
            assert ids[9:18] == list(range(9))

    def test_a_trace_is_replayed(self, server, tmp_path):
        trace = tmp_path / "trace.csv"
        trace.write_text("arrival_s,prompt_tokens,output_tokens\n7,3,2\n7.2,5,4\n8,6,1\n")
        options = ["--trace", str(trace), "--trace-scale", "10", "--num-requests", "2"]
        document = self.document(server, tmp_path, *options)
        sent = [
            (len(r.token_ids.ids), r.sampling_params.max_tokens) for r in server.service.requests
        ]
        assert sent == [(3, 2), (5, 4)]
        assert [r["started_s"] for r in document["requests"]] == [0.0, pytest.approx(0.02)]
        assert document["config"]["workload"]["file"]["name"] == "trace.csv"

    def test_prompts_of_a_file_are_sent_as_messages(self, server, tmp_path):
        prompts = tmp_path / "p.jsonl"
        prompts.write_text('"a b"\n{"prompt": "c", "output_tokens": 9}\n')
        options = ["--prompts", str(prompts), "--chat", "--num-requests", "2"]
        self.document(server, tmp_path, *options)
        sent = {(r.chat.messages[0].content, r.sampling_params.max_tokens)
                for r in server.service.requests}  # fmt: skip
        assert sent == {("a b", 128), ("c", 9)}

    def test_failed_requests_make_the_command_fail(self, server, capsys):
        server.service.errors.append(error_status(code_pb2.INTERNAL, "it broke"))
        assert run(server, "bench", "--prompt", "a", "--num-requests", "2") == 1
        assert "1 of 2 requests failed: ServerError" in capsys.readouterr().err

    def test_some_refusals_are_a_result_but_nothing_else_is_a_failure(self, server, capsys):
        server.service.errors.append(overloaded(1.0))
        assert run(server, "bench", "--prompt", "a", "--num-requests", "2") == 0
        assert "1 RESOURCE_EXHAUSTED" in capsys.readouterr().out
        server.service.errors.append(overloaded(1.0))
        assert run(server, "bench", "--prompt", "a", "--num-requests", "1") == 1

    def test_requests_longer_than_the_model_are_refused_before_sending(self, server, capsys):
        assert run(server, "bench", "--input-len", "60", "--output-len", "5") == 1
        assert "exceed the model's length of 64" in capsys.readouterr().err
        assert not server.service.requests

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--trace missing.csv", "No such file"),
            ("--prompt a --prompts b", "give one of"),
            ("--trace t --rate 1", "--trace-scale instead of --rate"),
            ("--trace-scale 2", "needs --trace"),
            ("--arrivals uniform", "needs --rate"),
            ("--rate 1 --burstiness 2", "needs --arrivals bursty"),
            ("--rate 1 --concurrency 2", "--max-outstanding"),
            ("--max-outstanding 2", "--concurrency"),
            ("--prefix-len 2", "need each other"),
            ("--prompt a --prefix-groups 1 --prefix-len 2", "for random prompts"),
            ("--prompt a --input-len 2", "for random prompts"),
            ("--trace t --turns 2", "no --turns"),
            ("--prompt a --turns 2", "--turns needs"),
            ("--think-time-s 1", "needs --turns"),
            ("--chat", "needs --prompt"),
            ("--prompts p --turns 2", "add --chat"),
            ("--max-prompt-chars 2", "needs --prompts"),
            ("--openai-model m", "need --openai"),
            ("--vocab-size 257", "exceeds the model's vocabulary of 256"),
            (f"--seed {2**64}", "seed must fit into 64 bits"),
            (f"--output-len {2**40}", "max_tokens must fit into 32 bits"),
        ],
    )
    def test_options_that_contradict_or_mean_nothing_are_one_line(
        self, server, options, message, capsys
    ):
        assert run(server, "bench", *options.split()) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert not server.service.requests

    @pytest.mark.parametrize(
        "option", ["--slo=ttft=5", "--rate=0", "--warmup=-1", "--think-time-s=nan"]
    )
    def test_values_that_mean_nothing_are_wrong_usage(self, server, option, capsys):
        with pytest.raises(SystemExit) as caught:
            run(server, "bench", option)
        assert caught.value.code == 2
        assert option.split("=")[0] in capsys.readouterr().err


class TestInfo:
    def test_text_names_model_health_and_load(self, server, capsys):
        assert run(server, "info") == 0
        text = capsys.readouterr().out
        assert "health         serving" in text
        assert "fake (LlamaForCausalLM)" in text
        assert "1 running, 2 waiting" in text
        assert "executor       unix:/e on cpu" in text
        assert "executor       unix:/f on gpu" in text
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
