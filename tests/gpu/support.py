"""What the GPU tests share: services on the GPU, and what transformers says of their tokens."""

import importlib.util
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm import Client, LocalServices, RequestOutput, SamplingParams
from nanovllm_core.random import exponential_noise
from tests.e2e.support import Metrics, running_services

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
NEEDS_FLASH_ATTN = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="needs the flash-attn package"
)

#: Float32 rounds differently in every kernel; a token this close to the best one is as good.
FLOAT32_MARGIN = 1e-3


@dataclass(frozen=True, slots=True)
class Oracle:
    """A checkpoint in transformers, in float32."""

    model: Any

    @torch.no_grad()
    def logits(self, prompt: list[int], token_ids: list[int]) -> Tensor:
        """The logits that each of `token_ids` was chosen from, given all tokens before it.

        Returns:
            [len(token_ids), vocab_size] float32, on the model's device.
        """
        known = torch.tensor([prompt + token_ids[:-1]], device=self.model.device)
        logits: Tensor = self.model(known).logits[0, len(prompt) - 1 :]
        return logits.float()

    @torch.no_grad()
    def next_logits(self, sequences: list[list[int]]) -> Tensor:
        """What follows sequences of one length: [len(sequences), vocab_size] float32."""
        known = torch.tensor(sequences, device=self.model.device)
        logits: Tensor = self.model(known).logits[:, -1]
        return logits.float()

    def regrets(self, prompt: list[int], token_ids: list[int]) -> Tensor:
        """How much more probable than each token the most probable one was; see `regrets`."""
        return regrets(self.logits(prompt, token_ids), token_ids)

    def drawing_regrets(
        self, prompt: list[int], token_ids: list[int], temperature: float, seed: int
    ) -> Tensor:
        """The same for tokens drawn without filters, with the random numbers of their seed.

        A draw takes the best of logits / temperature - log(noise), so there is a right answer.
        """
        logits = self.logits(prompt, token_ids)
        positions = len(prompt) + torch.arange(len(token_ids), device=logits.device)
        noise = exponential_noise(torch.full_like(positions, seed), positions, logits.shape[1])
        return regrets(logits / temperature - noise.log(), token_ids)


def regrets(scores: Tensor, token_ids: list[int]) -> Tensor:
    """How far each token's score is below the best of its row.

    All 0 means that the tokens are exactly those that always taking the best one gives. Unlike a
    comparison of ids this goes on behind a tie that rounding decided.

    Args:
        scores: [len(token_ids), vocab_size].
        token_ids: the chosen ones.

    Returns:
        [len(token_ids)], on the CPU.
    """
    chosen = torch.tensor(token_ids, device=scores.device)[:, None]
    return (scores.amax(dim=-1) - scores.gather(1, chosen).squeeze(1)).cpu()


@dataclass(frozen=True, slots=True)
class Served:
    """A model behind the services on the GPU, and in transformers."""

    services: LocalServices
    client: Client
    oracle: Oracle

    def scheduler_metrics(self) -> Metrics:
        """The scheduler's metrics now."""
        return Metrics(self.services.scheduler.metrics_url)

    def expect_greedy(self, prompt: list[int], token_ids: list[int]) -> None:
        """Fails unless the ids are what transformers chooses greedily, in float32."""
        worst = self.oracle.regrets(prompt, token_ids).max().item()
        assert worst < FLOAT32_MARGIN


@contextmanager
def served_on_gpu(
    checkpoint: Path,
    oracle: Oracle,
    log_dir: Path,
    *,
    dtype: str,
    backend: str,
    executor: Sequence[str],
) -> Iterator[Served]:
    """Both services for a checkpoint; `executor` holds further arguments of the executor."""
    arguments = ["--device", "cuda", "--dtype", dtype, "--attention-backend", backend, *executor]
    with (
        running_services(checkpoint, log_dir, executor=arguments, metrics=True) as services,
        Client(services.address) as client,
    ):
        summary = client.server_status().executor
        assert summary is not None
        assert summary.device == torch.cuda.get_device_name()
        assert (summary.dtype, summary.attention_backend) == (dtype, backend)
        yield Served(services, client, oracle)


def generate_together(
    client: Client, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
) -> list[RequestOutput]:
    """Sends all requests at once and waits for all."""
    with ThreadPoolExecutor(len(prompts)) as threads:
        return list(threads.map(client.generate, prompts, params))
