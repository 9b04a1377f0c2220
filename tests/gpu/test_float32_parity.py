"""Float32 on the GPU: the whole system generates the tokens of transformers on the CPU."""

from collections.abc import Callable, Iterator

import pytest

from tests.e2e.support import greedy, random_prompt
from tests.gpu.conftest import Tiny
from tests.gpu.support import NEEDS_GPU, Served, generate_together, served_on_gpu

pytestmark = NEEDS_GPU

BLOCK_SIZE = 16
NUM_KV_BLOCKS = 96
MAX_NUM_SEQS = 16
MAX_NUM_BATCHED_TOKENS = 64
# Decode iterations as CUDA graphs, kernel by kernel, and in plain torch.
WAYS = {
    "graphs": ("triton", ()),
    "eager": ("triton", ("--enforce-eager",)),
    "torch": ("torch", ()),
}


@pytest.fixture(
    scope="module",
    params=[(name, way) for name in ("qwen3", "llama", "qwen2") for way in WAYS],
    ids="-".join,
)
def served(
    request: pytest.FixtureRequest,
    tiny: Callable[[str, str], Tiny],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    architecture, way = request.param
    backend, options = WAYS[way]
    model = tiny(architecture, "float32")
    with served_on_gpu(
        model.checkpoint,
        model.oracle,
        tmp_path_factory.mktemp("logs"),
        dtype="float32",
        backend=backend,
        executor=[
            *("--block-size", str(BLOCK_SIZE), "--num-kv-blocks", str(NUM_KV_BLOCKS)),
            *("--max-num-seqs", str(MAX_NUM_SEQS), "--max-model-len", "1024"),
            *("--max-num-batched-tokens", str(MAX_NUM_BATCHED_TOKENS)),
            *options,
        ],
    ) as running:
        yield running


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens"),
    [(1, 32), (5, 100), (10 * MAX_NUM_BATCHED_TOKENS + 1, 64)],
    ids=["one-token", "short", "beyond-the-token-budget"],
)
def test_single_prompt_gives_the_tokens_of_transformers(
    served: Served, prompt_len: int, max_tokens: int
) -> None:
    prompt = random_prompt(prompt_len, seed=prompt_len)
    token_ids = served.client.generate(prompt, greedy(max_tokens)).token_ids
    assert len(token_ids) == max_tokens
    served.expect_greedy(prompt, token_ids)


def test_concurrent_prompts_of_all_lengths_give_the_tokens_of_transformers(
    served: Served,
) -> None:
    prompts = [random_prompt(1 + 9 * index, seed=10 + index) for index in range(MAX_NUM_SEQS)]
    params = [greedy(40 + 5 * index) for index in range(MAX_NUM_SEQS)]
    outputs = generate_together(served.client, prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        served.expect_greedy(prompt, output.token_ids)


def test_prompts_that_share_a_cached_prefix_give_the_tokens_of_transformers(
    served: Served,
) -> None:
    prefix = random_prompt(5 * BLOCK_SIZE + 3, seed=3)
    served.client.generate(prefix, greedy(1))
    for ending in ([1], [2, 3], random_prompt(40, seed=4)):
        prompt = prefix + ending
        output = served.client.generate(prompt, greedy(24))
        assert output.num_cached_tokens == 5 * BLOCK_SIZE
        served.expect_greedy(prompt, output.token_ids)


def test_preempted_requests_resume_with_the_tokens_of_transformers(served: Served) -> None:
    before = served.scheduler_metrics()["num_preemptions_total"]
    # The completions of one request start together, and those of either fill the cache 1.5 times.
    num_completions, max_tokens = MAX_NUM_SEQS // 2, 280
    prompts = [random_prompt(20, seed=70), random_prompt(33, seed=71)]
    assert num_completions * max_tokens > 1.4 * NUM_KV_BLOCKS * BLOCK_SIZE
    outputs = generate_together(
        served.client, prompts, [greedy(max_tokens, n=num_completions)] * len(prompts)
    )
    assert served.scheduler_metrics()["num_preemptions_total"] > before
    for prompt, output in zip(prompts, outputs, strict=True):
        # Equal ones, if no tie was decided differently.
        for token_ids in {tuple(completion.token_ids) for completion in output.completions}:
            assert len(token_ids) == max_tokens
            served.expect_greedy(prompt, list(token_ids))
