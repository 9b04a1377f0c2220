"""Load on servers with OpenAI's API."""

import asyncio
import json
import socket

import pytest

pytest.importorskip("aiohttp", reason="comes with the extra bench-openai")

from nanovllm.cli import main
from nanovllm.load import LoadRequest, Session, run_closed, run_load
from nanovllm.load.openai_target import ChunkReader, OpenAITarget, request_body
from nanovllm.load.sse import SseDecoder
from nanovllm.load.target import Piece, RequestFailedError
from nanovllm.outputs import Usage
from nanovllm.sampling_params import SamplingParams
from tests.client.fake_openai import DONE, FakeOpenAI, chat_chunk, text_chunk, usage_chunk

PARAMS = SamplingParams(temperature=0.0, seed=5, max_tokens=3)
HELLO = ({"role": "user", "content": "hello"},)


@pytest.fixture
def fake():
    with FakeOpenAI.running() as service:
        service.chunks = [
            chat_chunk(None),
            chat_chunk("a"),
            chat_chunk("b"),
            chat_chunk("", finish_reason="length"),
            usage_chunk(prompt_tokens=12, completion_tokens=5, cached_tokens=8),
        ]
        yield service


def load(fake, sessions, concurrency=1, **options):
    async def run():
        async with OpenAITarget(fake.url, "m", **options) as target:
            return await run_closed(target, sessions, concurrency)

    return asyncio.run(run())


def one(fake, prompt=HELLO, **options):
    (timing,) = load(fake, [Session([LoadRequest(prompt, PARAMS)])], **options)
    return timing


class TestTarget:
    def test_a_chat_is_streamed_and_its_tokens_are_counted(self, fake):
        timing = one(fake)
        assert timing.failure is None
        assert (timing.num_prompt_tokens, timing.num_cached_tokens) == (12, 8)
        # Two pieces of text came, of five tokens in all.
        assert (timing.num_deltas, timing.num_output_tokens, len(timing.itl_s)) == (2, 5, 1)
        assert 0 < timing.ttft_s <= timing.e2e_s
        assert timing.tpot_s == pytest.approx(timing.itl_s[0] / 4)
        ((path, _, body),) = fake.requests
        assert path == "/v1/chat/completions"
        assert body == {
            "model": "m",
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 3,
            "temperature": 0.0,
            "seed": 5,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    @pytest.mark.parametrize("prompt", ["some text", [5, 6, 7]])
    def test_text_and_token_ids_go_to_completions(self, fake, prompt):
        fake.chunks = [text_chunk("a"), text_chunk("b", finish_reason="stop")]
        timing = one(fake, prompt)
        assert (timing.failure, timing.num_output_tokens) == (None, 2)
        ((path, _, body),) = fake.requests
        assert (path, body["prompt"]) == ("/v1/completions", prompt)

    def test_the_key_is_sent_and_fields_can_be_added_and_removed(self, fake):
        extra = {"ignore_eos": True, "max_tokens": None, "max_completion_tokens": 3}
        one(fake, api_key="secret", extra_body=extra)
        ((_, headers, body),) = fake.requests
        assert headers["Authorization"] == "Bearer secret"
        assert body["ignore_eos"] is True
        assert body["max_completion_tokens"] == 3
        assert "max_tokens" not in body

    def test_connections_are_used_again(self, fake):
        load(fake, [Session([LoadRequest(HELLO, PARAMS)])] * 6, concurrency=2)
        assert len(fake.requests) == 6
        assert fake.num_connections <= 2

    def test_later_turns_resend_the_conversation(self, fake):
        turns = [
            LoadRequest(HELLO, PARAMS),
            LoadRequest([{"role": "user", "content": "c"}], PARAMS),
        ]
        assert len(load(fake, [Session(turns)])) == 2
        assert [m["content"] for m in fake.requests[1][2]["messages"]] == ["hello", "ab", "c"]

    @pytest.mark.parametrize(
        ("status", "body", "message", "is_refusal"),
        [
            (429, '{"error": {"message": "slow down"}}', "slow down", True),
            (503, "busy", "busy", True),
            (400, '{"error": "no such field"}', "no such field", True),
            (500, "[]", "[]", False),
            (502, "", "no message", False),
        ],
    )
    def test_an_http_error_is_a_refusal_or_a_failure(self, fake, status, body, message, is_refusal):
        fake.errors.append((status, body))
        failure = one(fake).failure
        assert (failure.code, failure.message) == (f"HTTP {status}", message)
        assert failure.is_refusal is is_refusal

    def test_a_stream_that_ends_early_is_a_failure(self, fake):
        fake.chunks = [chat_chunk("a")]
        assert one(fake).failure.code == "CUT SHORT"

    def test_a_connection_that_breaks_is_a_failure(self, fake):
        fake.breaks = True
        timing = one(fake)
        assert timing.failure.code == "CONNECTION"
        assert not timing.failure.is_refusal

    def test_no_server_is_a_failure_that_names_the_url(self):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            fake = FakeOpenAI(url=f"http://127.0.0.1:{unused.getsockname()[1]}/v1")
            failure = one(fake).failure
        assert failure.code == "CONNECTION"
        assert failure.message.startswith(fake.url)

    @pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http:///v1", ""])
    def test_what_is_no_url_is_refused(self, url):
        async def make() -> None:
            OpenAITarget(url, "m")

        with pytest.raises(ValueError, match="is no URL"):
            asyncio.run(make())

    def test_single_requests_can_be_sent_too(self, fake):
        async def run():
            async with OpenAITarget(fake.url, "m") as target:
                return await run_load(target, [LoadRequest(HELLO, PARAMS)] * 3, 3)

        assert [timing.num_output_tokens for timing in asyncio.run(run())] == [5, 5, 5]


class TestChunks:
    def read(self, *chunks):
        reader = ChunkReader()
        return [reader.read(c if isinstance(c, str) else json.dumps(c)) for c in chunks]

    def test_a_running_count_says_how_many_tokens_a_chunk_has(self):
        usages = [{"prompt_tokens": 4, "completion_tokens": count} for count in (3, 3, 5)]
        chunks = [text_chunk("x") | {"usage": usage} for usage in usages]
        assert [piece.num_tokens for piece in self.read(*chunks)] == [3, 0, 2]

    @pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
    def test_thinking_counts_as_tokens(self, name):
        (piece,) = self.read({"choices": [{"delta": {name: "hm", "content": None}}]})
        assert (piece.num_tokens, piece.text) == (1, "hm")

    def test_the_end_is_no_piece(self):
        assert self.read(DONE) == [None]

    def test_usage_without_details_is_read(self):
        usage = {"prompt_tokens": 4, "completion_tokens": 2, "prompt_tokens_details": None}
        assert self.read({"choices": [], "usage": usage}) == [Piece(0, usage=Usage(4, 2, 0))]

    def test_an_error_in_the_stream_is_raised(self):
        with pytest.raises(RequestFailedError, match="it broke") as caught:
            self.read({"error": {"message": "it broke"}})
        assert caught.value.failure.code == "STREAM ERROR"

    @pytest.mark.parametrize("event", ["{", "5", "[]", '{"choices": [{}]}', '{"choices": [5]}'])
    def test_what_is_no_chunk_is_a_failure(self, event):
        with pytest.raises(RequestFailedError, match="no chunk") as caught:
            self.read(event)
        assert caught.value.failure.code == "BAD STREAM"

    def test_parameters_that_are_not_set_are_not_sent(self):
        path, body = request_body(LoadRequest("a", SamplingParams()), "m", {})
        assert path == "/completions"
        assert set(body) == {"model", "prompt", "stream", "stream_options"}


class TestEvents:
    STREAM = ": note\r\n\r\ndata: a\n\ndata:é\r\ndata: c\r\n\r\nevent: x\rdata: d\r\r\n".encode()
    EVENTS = ("a", "é\nc", "d")

    def decoded(self, *pieces: bytes) -> tuple[str, ...]:
        decoder = SseDecoder()
        return tuple(event for piece in pieces for event in decoder.feed(piece))

    def test_events_do_not_depend_on_where_the_bytes_are_cut(self):
        for cut in range(len(self.STREAM)):
            assert self.decoded(self.STREAM[:cut], self.STREAM[cut:]) == self.EVENTS, cut

    def test_events_are_read_byte_by_byte(self):
        assert self.decoded(*(bytes([byte]) for byte in self.STREAM)) == self.EVENTS

    def test_an_event_is_given_as_soon_as_it_ends(self):
        decoder = SseDecoder()
        assert decoder.feed(b"data: a\n") == []
        assert decoder.feed(b"\n") == ["a"]


class TestCommand:
    def bench(self, fake, *arguments: str) -> int:
        return main(["bench", "--openai", fake.url, "--openai-model", "m", *arguments])

    def test_the_report_is_the_same_as_for_our_own_server(
        self, fake, capsys, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        path = tmp_path / "r.json"
        options = ["--prompt", "hello", "--chat", "--num-requests", "4", "--json", str(path)]
        assert self.bench(fake, *options, "--openai-body", '{"ignore_eos": true}') == 0
        document = json.loads(path.read_text())
        assert document["target"] == {
            "api": "openai",
            "model": "m",
            "body": {"ignore_eos": True},
        }
        assert document["report"]["num_output_tokens"] == 20
        assert document["report"]["prefix_hit_rate"] == pytest.approx(8 / 12)
        assert "secret" not in path.read_text()
        assert fake.requests[0][1]["Authorization"] == "Bearer secret"
        assert "TTFT" in capsys.readouterr().out

    def test_random_prompts_have_ids_below_the_given_vocabulary(self, fake):
        fake.chunks = [text_chunk("a", finish_reason="length")]
        assert (
            self.bench(fake, "--num-requests", "3", "--input-len", "50", "--vocab-size", "9") == 0
        )
        prompts = [body["prompt"] for _, _, body in fake.requests]
        assert [len(prompt) for prompt in prompts] == [50] * 3
        assert max(map(max, prompts)) == 8

    def test_the_model_has_to_be_named(self, fake, capsys):
        assert main(["bench", "--openai", fake.url]) == 1
        assert "--openai needs --openai-model" in capsys.readouterr().err

    def test_a_wrong_url_is_one_line(self, capsys):
        assert main(["bench", "--openai", "host:80", "--openai-model", "m"]) == 1
        assert "is no URL" in capsys.readouterr().err

    def test_turns_of_token_ids_need_ids_that_the_server_does_not_return(self, fake, capsys):
        assert self.bench(fake, "--turns", "2") == 1
        assert "do not return token ids" in capsys.readouterr().err

    @pytest.mark.parametrize("body", ["{", "[]"])
    def test_a_body_that_is_no_object_is_wrong_usage(self, fake, body, capsys):
        with pytest.raises(SystemExit) as caught:
            self.bench(fake, "--openai-body", body)
        assert caught.value.code == 2
        assert "JSON" in capsys.readouterr().err
