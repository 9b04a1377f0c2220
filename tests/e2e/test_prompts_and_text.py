"""What goes in as text, ids or chat, and what comes out as text."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from nanovllm import Chat, Client, SamplingParams
from nanovllm.requests import generate_request
from nanovllm.v1 import inference_pb2_grpc
from tests.e2e.support import LIMIT_S, greedy, wait_until

IM_START, IM_END = 257, 258
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "naïve 日本 🙂"},
]
REPLACEMENT = "\ufffd"


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Callable[[str], Path]) -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint("qwen3") / "tokenizer.json"))


class TestPrompts:
    def test_text_generates_what_its_token_ids_generate(self, client: Client) -> None:
        text = "Hello, wörld <|im_end|>"
        token_ids = client.tokenize(text)
        assert token_ids[-1] == IM_END
        by_text = client.generate(text, greedy(16))
        assert by_text.num_prompt_tokens == len(token_ids)
        assert by_text.token_ids == client.generate(token_ids, greedy(16)).token_ids

    def test_chat_generates_what_the_rendered_template_generates(
        self, client: Client, checkpoint: Callable[[str], Path]
    ) -> None:
        peer = PreTrainedTokenizerFast.from_pretrained(checkpoint("qwen3"))
        for add_generation_prompt in (True, False):
            rendered = peer.apply_chat_template(
                MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            token_ids = peer(rendered, add_special_tokens=False).input_ids
            chat = Chat(MESSAGES, add_generation_prompt=add_generation_prompt)
            assert client.tokenize(chat) == token_ids
            by_chat = client.generate(chat, greedy(16))
            assert by_chat.num_prompt_tokens == len(token_ids)
            assert by_chat.token_ids == client.generate(token_ids, greedy(16)).token_ids

    def test_template_variables_reach_the_chat_template(self, client: Client) -> None:
        token_ids = client.tokenize(Chat(MESSAGES, template_kwargs={"note": "NB"}))
        assert token_ids == client.tokenize("NB") + client.tokenize(Chat(MESSAGES))

    def test_detokenize_reverses_tokenize(self, client: Client) -> None:
        text = "naïve 日本 🙂\n"
        assert client.detokenize(client.tokenize(text)) == text

    def test_detokenize_leaves_special_tokens_out_unless_told_otherwise(
        self, client: Client
    ) -> None:
        token_ids = client.tokenize("a<|im_end|>b")
        assert client.detokenize(token_ids) == "ab"
        assert client.detokenize(token_ids, skip_special_tokens=False) == "a<|im_end|>b"

    def test_usage_counts_prompt_output_and_cached_tokens(self, client: Client) -> None:
        prompt = list(range(100, 140))
        salt = "usage"
        first = client.generate(prompt, greedy(5), cache_salt=salt)
        again = client.generate(prompt, greedy(5), cache_salt=salt)
        other = client.generate(prompt, greedy(5), cache_salt="another salt")
        usages = [output.completions[0].usage for output in (first, again, other)]
        assert [usage.prompt_tokens for usage in usages] == [40, 40, 40]
        assert [usage.completion_tokens for usage in usages] == [5, 5, 5]
        # Two full blocks of 16 tokens; a prefix of another salt is not shared.
        assert [usage.cached_tokens for usage in usages] == [0, 32, 0]
        assert first.token_ids == again.token_ids == other.token_ids

    def test_cached_tokens_leave_one_token_to_compute(self, client: Client) -> None:
        prompt = list(range(150, 182))
        client.generate(prompt, greedy(1))
        assert client.generate(prompt, greedy(1)).num_cached_tokens == 16


class TestText:
    def test_deltas_concatenate_to_the_decoded_tokens(
        self, client: Client, tokenizer: Tokenizer
    ) -> None:
        with client.stream("abc", greedy(120)) as stream:
            deltas = list(stream)
        assert len(deltas) > 1
        token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
        assert len(token_ids) == 120
        assert "".join(delta.text for delta in deltas) == tokenizer.decode(token_ids)

    @pytest.mark.parametrize("seed", range(6))
    def test_random_bytes_give_the_text_that_decoding_at_once_gives(
        self, client: Client, tokenizer: Tokenizer, seed: int
    ) -> None:
        # All 256 bytes are about equally likely at this temperature.
        params = SamplingParams(temperature=100.0, seed=seed, max_tokens=400, ignore_eos=True)
        output = client.generate("abc", params)
        expected = tokenizer.decode(output.token_ids)
        assert expected.count(REPLACEMENT) > 50
        assert output.text == expected

    def test_characters_of_several_bytes_are_never_split(
        self, client: Client, tokenizer: Tokenizer
    ) -> None:
        # Only the bytes of one emoji can be chosen, so many valid characters appear among others.
        emoji = tokenizer.encode("🙂").ids
        assert len(emoji) == 4
        bias = dict.fromkeys(emoji, 100.0)
        params = SamplingParams(
            temperature=4.0, seed=3, max_tokens=1000, logit_bias=bias, ignore_eos=True
        )
        with client.stream("abc", params) as stream:
            deltas = list(stream)
        token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
        text = "".join(delta.text for delta in deltas)
        assert set(token_ids) == set(emoji)
        assert "🙂" in text
        assert text == tokenizer.decode(token_ids)

    def test_special_tokens_are_left_out_of_the_text_unless_asked_for(self, client: Client) -> None:
        params = greedy(3, logit_bias={IM_START: 100.0})
        skipped = client.generate("a", params)
        kept = client.generate("a", replace(params, skip_special_tokens=False))
        assert skipped.token_ids == kept.token_ids == [IM_START] * 3
        assert skipped.text == ""
        assert kept.text == "<|im_start|>" * 3

    def test_without_detokenization_there_are_ids_and_no_text(self, client: Client) -> None:
        output = client.generate("abc", greedy(20, detokenize=False))
        assert output.text == ""
        assert output.token_ids == client.generate("abc", greedy(20)).token_ids


def test_slow_reader_gets_fewer_messages_and_every_token(client: Client) -> None:
    # 300 KB in all, several times what the connection buffers for a client that does not read.
    params = SamplingParams(
        temperature=5.0, seed=1, n=4, max_tokens=400, ignore_eos=True, logprobs=20
    )
    expected = client.generate("abc", params)
    request = generate_request("abc", params)
    # Without this option gRPC's buffers grow with the connection's speed.
    with grpc.insecure_channel(client.address, [("grpc.http2.bdp_probe", 0)]) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=LIMIT_S)
        responses = [next(call)]
        wait_until(lambda: client.server_status().num_running == 0, "everything is generated")
        responses += call
    for completion in expected.completions:
        parts = [part for part in responses if part.index == completion.index]
        assert max(len(part.token_ids) for part in parts) > 50
        assert "".join(part.text for part in parts) == completion.text
        assert [token for part in parts for token in part.token_ids] == completion.token_ids
        assert sum(len(part.logprobs) for part in parts) == 400
