"""Bfloat16 on the GPU: every attention backend and page size against float32 on the CPU.

Bfloat16 decides close choices differently, so that token ids prove nothing; what counts is how
probable the chosen tokens are, each given all before it.
"""

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.e2e.support import greedy, random_prompt
from tests.gpu.conftest import Tiny
from tests.gpu.support import (
    NEEDS_FLASH_ATTN,
    NEEDS_GPU,
    Served,
    generate_together,
    served_on_gpu,
)

pytestmark = NEEDS_GPU

# More than the 64 rows that the fused kernels take, and than the 16 from which flash-attn decodes.
MAX_NUM_SEQS = 80
MAX_NUM_BATCHED_TOKENS = 128
NUM_KV_TOKENS = 64 * 1024
# Some lengths end just before a page of 256 tokens does; the longest takes three iterations.
PROMPT_LENS = (1, 9, 60, 64, 130, 200, 250, 300)

# transformers in bfloat16 is off by 0.02 on average and 0.26 at most on this checkpoint, whose
# logits spread with a standard deviation of 4; a random token would be off by 15.
MEAN_TOLERANCE = 0.06
TOLERANCE = 0.6


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(("flash_attn", size), marks=NEEDS_FLASH_ATTN) for size in (16, 64, 256)),
        ("triton", 64),
        ("torch", 64),
    ],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def served(
    request: pytest.FixtureRequest,
    tiny: Callable[[str, str], Tiny],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    backend, block_size = request.param
    model = tiny("qwen3", "bfloat16")
    with served_on_gpu(
        model.checkpoint,
        model.oracle,
        tmp_path_factory.mktemp("logs"),
        dtype="bfloat16",
        backend=backend,
        executor=[
            *("--block-size", str(block_size)),
            *("--num-kv-blocks", str(NUM_KV_TOKENS // block_size)),
            *("--max-num-seqs", str(MAX_NUM_SEQS), "--max-model-len", "1024"),
            *("--max-num-batched-tokens", str(MAX_NUM_BATCHED_TOKENS)),
        ],
    ) as running:
        yield running


def expect_small(errors: torch.Tensor) -> None:
    assert errors.max().item() < TOLERANCE
    assert errors.mean().item() < MEAN_TOLERANCE


def test_log_probabilities_are_those_of_transformers_in_float32(served: Served) -> None:
    prompts = [random_prompt(length, seed=length) for length in PROMPT_LENS]
    # Iterations that return log-probabilities run without graphs.
    outputs = generate_together(served.client, prompts, [greedy(48, logprobs=0)] * len(prompts))
    errors = []
    for prompt, output in zip(prompts, outputs, strict=True):
        (completion,) = output.completions
        assert completion.logprobs is not None
        ours = torch.tensor([entry.logprob for entry in completion.logprobs])
        every = served.oracle.logits(prompt, output.token_ids).log_softmax(-1)
        exact = every.gather(1, torch.tensor(output.token_ids)[:, None]).squeeze(1)
        errors.append((ours - exact).abs())
    expect_small(torch.cat(errors))


def test_tokens_of_concurrent_prompts_are_the_most_probable_ones(served: Served) -> None:
    prompts = [random_prompt(length, seed=1000 + length) for length in PROMPT_LENS]
    outputs = generate_together(served.client, prompts, [greedy(96)] * len(prompts))
    expect_small(
        torch.cat(
            [
                served.oracle.regrets(prompt, output.token_ids)
                for prompt, output in zip(prompts, outputs, strict=True)
            ]
        )
    )


def test_tokens_of_a_large_batch_are_the_most_probable_ones(served: Served) -> None:
    # The completions of one request start together.
    prompts = [random_prompt(240, seed=50), random_prompt(70, seed=51)]
    counts = [64, MAX_NUM_SEQS - 64]
    outputs = generate_together(served.client, prompts, [greedy(64, n=count) for count in counts])
    for prompt, count, output in zip(prompts, counts, outputs, strict=True):
        assert len(output.completions) == count
        for token_ids in {tuple(completion.token_ids) for completion in output.completions}:
            assert len(token_ids) == 64
            expect_small(served.oracle.regrets(prompt, list(token_ids)))
