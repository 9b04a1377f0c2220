"""The embedded model, a real one, against transformers."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanovllm import Client, ModelNotFoundError, SamplingParams
from nanovllm.model_store import resolve_model
from tests.e2e.support import Reference, greedy, running_services

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea, there lived",
)
NUM_TOKENS = 20


@pytest.fixture(scope="module")
def model() -> Path:
    try:
        return resolve_model(MODEL)
    except ModelNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def exact(model: Path) -> Reference:
    return Reference(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval())


@pytest.fixture(scope="module")
def client(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with (
        running_services(
            model,
            tmp_path_factory.mktemp("logs"),
            # A small budget, so that prompts come in chunks.
            executor=["--max-num-seqs", "8", "--max-num-batched-tokens", "32"],
        ) as services,
        Client(services.address) as connected,
    ):
        yield connected


def test_float32_tokens_equal_those_of_transformers_alone_and_in_a_batch(
    client: Client, exact: Reference
) -> None:
    prompts = [client.tokenize(text) for text in (*TEXTS, " ".join(TEXTS) * 2)]
    expected = [exact.greedy(prompt, NUM_TOKENS) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        outputs = list(
            threads.map(lambda prompt: client.generate(prompt, greedy(NUM_TOKENS)), prompts)
        )
    assert [output.token_ids for output in outputs] == expected
    assert client.generate(prompts[0], greedy(NUM_TOKENS)).token_ids == expected[0]


def test_chat_is_tokenized_and_answered_as_by_transformers(
    client: Client, exact: Reference, model: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rendered = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(rendered, add_special_tokens=False).input_ids
    assert client.tokenize(QUESTION) == prompt
    output = client.generate(QUESTION, SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS))
    expected = exact.greedy(prompt, NUM_TOKENS)
    eos = client.model_info().eos_token_ids
    ends = [index for index, token_id in enumerate(expected) if token_id in eos]
    assert output.token_ids == (expected[: ends[0] + 1] if ends else expected)
    assert "Paris" in output.text
    assert output.text == tokenizer.decode(output.token_ids, skip_special_tokens=True)


def test_text_of_many_scripts_survives_the_round_trip(client: Client) -> None:
    text = "Grüße, 東京! Привет 🙂 1234 \n\t x = [1, 2]"
    assert client.detokenize(client.tokenize(text)) == text


def test_bfloat16_log_probabilities_are_as_exact_as_those_of_transformers(
    model: Path, exact: Reference, tmp_path: Path
) -> None:
    with (
        running_services(
            model, tmp_path, executor=["--dtype", "bfloat16", "--max-num-seqs", "4"]
        ) as services,
        Client(services.address) as client,
    ):
        executor = client.server_status().executor
        assert executor is not None
        assert executor.dtype == "bfloat16"
        prompt = client.tokenize(" ".join(TEXTS))
        output = client.generate(prompt, greedy(NUM_TOKENS, logprobs=0))
    (completion,) = output.completions
    assert completion.logprobs is not None
    ours = torch.tensor([entry.logprob for entry in completion.logprobs])
    peer = Reference(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval())

    def forced(of: Reference) -> torch.Tensor:
        """What a model says of the tokens that the service chose, given all before them."""
        every = of.logprobs(prompt + output.token_ids)[len(prompt) - 1 : -1]
        return every.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]

    truth = forced(exact)
    error = (ours - truth).abs().mean().item()
    peer_error = (forced(peer) - truth).abs().mean().item()
    assert error < 2.0 * peer_error
    assert error < 0.05
