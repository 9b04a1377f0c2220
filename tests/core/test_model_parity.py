"""The model against transformers on tiny random checkpoints."""

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.checkpoints import make_checkpoint
from tests.core.paged_runner import PagedRunner, Sequence
from tests.core.rope_kinds import ROPE_KINDS

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-tied": ("qwen3", {}),
    "qwen3-untied": ("qwen3", {"tied": False}),
    "qwen3-biased": ("qwen3", {"attention_bias": True}),
    "llama-tied": ("llama", {}),
    "llama-untied": ("llama", {"tied": False}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama-multi-query": ("llama", {"num_key_value_heads": 1}),
    "qwen2-tied": ("qwen2", {}),
    "qwen2-untied": ("qwen2", {"tied": False}),
    "mistral": ("mistral", {}),
    **{f"llama-{kind}": ("llama", {"rope_scaling": value}) for kind, value in ROPE_KINDS.items()},
}

NUM_GENERATED = 24


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(320), k=length)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def make(variant: str) -> Path:
        architecture, options = VARIANTS[variant]
        return make_checkpoint(tmp_path_factory.mktemp(variant), architecture, **options)

    return make


@pytest.fixture(scope="module")
def reference(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    @cache
    def load(variant: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(checkpoint(variant)).eval()

    return load


@torch.inference_mode()
def reference_logits(model: Any, token_ids: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([token_ids])).logits[0].float()
    return logits


def reference_tokens(model: Any, token_ids: list[int]) -> list[int]:
    inputs = torch.tensor([token_ids])
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=NUM_GENERATED,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = output[0, len(token_ids) :].tolist()
    return tokens


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_greedy_tokens_equal_those_of_transformers(
    checkpoint: Callable[[str], Path], reference: Callable[[str], Any], variant: str
) -> None:
    token_ids = prompt(90)
    runner = PagedRunner(checkpoint(variant))
    logits = runner.run([(Sequence(token_ids), len(token_ids))])[0]
    torch.testing.assert_close(
        logits, reference_logits(reference(variant), token_ids), rtol=1e-3, atol=1e-3
    )
    expected = reference_tokens(reference(variant), token_ids)
    assert len(set(expected)) > 5
    assert runner.generate(token_ids, NUM_GENERATED) == expected


@pytest.mark.parametrize("chunk", [1, 3, 4, 17])
def test_chunked_prefill_gives_the_same_logits(
    checkpoint: Callable[[str], Path], reference: Callable[[str], Any], chunk: int
) -> None:
    token_ids = prompt(41)
    runner = PagedRunner(checkpoint("qwen3-tied"))
    sequence = Sequence(token_ids)
    parts = []
    while sequence.num_computed < len(token_ids):
        parts += runner.run([(sequence, min(chunk, len(token_ids) - sequence.num_computed))])
    torch.testing.assert_close(
        torch.cat(parts), reference_logits(reference("qwen3-tied"), token_ids), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("variant", ["qwen3-tied", "llama-untied", "qwen2-tied"])
def test_mixed_batches_of_chunks_decode_rows_and_padding_give_the_same_tokens(
    checkpoint: Callable[[str], Path], reference: Callable[[str], Any], variant: str
) -> None:
    runner = PagedRunner(checkpoint(variant), seed=3)
    lengths = [1, 5, 37, 64]
    sequences = [Sequence(prompt(length, seed=length)) for length in lengths]
    iteration = 0
    while any(
        len(seq.token_ids) < length + NUM_GENERATED
        for seq, length in zip(sequences, lengths, strict=True)
    ):
        # Sequences start one after the other, so that chunks meet decode rows.
        live = [
            seq
            for index, (seq, length) in enumerate(zip(sequences, lengths, strict=True))
            if index * 2 <= iteration and len(seq.token_ids) < length + NUM_GENERATED
        ]
        work = [(seq, min(7, len(seq.token_ids) - seq.num_computed)) for seq in live]
        for seq, logits in zip(live, runner.run(work, num_padded=iteration % 3), strict=True):
            if seq.num_computed == len(seq.token_ids):
                seq.token_ids.append(int(logits[-1].argmax()))
        iteration += 1
    for seq, length in zip(sequences, lengths, strict=True):
        expected = reference_tokens(reference(variant), seq.token_ids[:length])
        assert seq.token_ids[length:] == expected


def test_sequences_may_share_blocks_that_the_same_iteration_writes(
    checkpoint: Callable[[str], Path], reference: Callable[[str], Any]
) -> None:
    runner = PagedRunner(checkpoint("llama-tied"))
    shared = prompt(8)
    first, second = Sequence(shared + [1, 2, 3]), Sequence(shared + [4, 5])
    first.blocks = [runner.free_blocks.pop() for _ in range(3)]
    # The second one starts behind the prefix, whose KV only the first one computes.
    second.blocks = first.blocks[:2]
    second.num_computed = 8
    logits = runner.run([(first, 11), (second, 2)])
    for actual, seq in zip(logits, (first, second), strict=True):
        expected = reference_logits(reference("llama-tied"), seq.token_ids)[-1]
        torch.testing.assert_close(actual[-1], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", ["qwen3-tied", "llama-untied", "qwen2-tied"])
def test_bfloat16_is_as_close_to_float32_as_that_of_transformers(
    checkpoint: Callable[[str], Path], reference: Callable[[str], Any], variant: str
) -> None:
    token_ids = prompt(120)
    exact = reference_logits(reference(variant), token_ids).log_softmax(-1)
    peer = AutoModelForCausalLM.from_pretrained(checkpoint(variant), dtype=torch.bfloat16).eval()
    sequence = Sequence(token_ids)
    runner = PagedRunner(checkpoint(variant), dtype=torch.bfloat16)
    # Teacher-forced: the first part as a chunk, the rest token by token.
    parts = runner.run([(sequence, 100)])
    while sequence.num_computed < len(token_ids):
        sequence.token_ids = token_ids[: sequence.num_computed + 1]
        parts += runner.run([(sequence, 1)])
    targets = torch.tensor(token_ids[1:])[:, None]

    def error(logits: Tensor) -> float:
        difference = (logits.log_softmax(-1) - exact)[:-1].gather(1, targets)
        return difference.abs().mean().item()

    assert error(torch.cat(parts)) < 1.25 * error(reference_logits(peer, token_ids))
