"""The real executor process around a simulated GPU: what everything but the device can do.

    python -m benchmarks.throughput --simulated-device --model smollm2-135m-instruct

The device takes as long as an H100 takes for Qwen3-0.6B, roughly, and draws its tokens at random:

    iteration = 0.6 ms + contexts * 112 KiB / 2.9 TB/s + 2.5 us a row + 2.5 us a prefill token

So a machine without a GPU shows where scheduler, wire and client become the limit. Its processes
need cores of their own, as they would have beside a GPU.
"""

import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from executor_service.batch_state import FINISH_LENGTH, FINISH_NONE, BatchState
from executor_service.engine_factory import Engine
from executor_service.plan_reader import ExecutorLimits
from executor_service.runner import StepOutput
from executor_service.server import serve
from executor_service.settings import ExecutorSettings
from executor_service.slots import Chunk, SlotTable
from nanovllm.logs import start_logging
from nanovllm.service_settings import StartupError
from nanovllm_core.config import ModelConfig

_STEP_S = 0.6e-3
_SECONDS_PER_CONTEXT_TOKEN = 112 * 1024 / 2.9e12
_SECONDS_PER_ROW = 2.5e-6
_SECONDS_PER_PREFILL_TOKEN = 2.5e-6
_NUM_BLOCKS = 11_000
_BLOCK_SIZE = 64
_MAX_NUM_BATCHED_TOKENS = 8192
_MAX_MODEL_LEN = 4096


@dataclass(frozen=True, slots=True)
class _SimulatedStep:
    end_s: float
    output: StepOutput

    def has_ended(self) -> bool:
        """Whether the device would have ended."""
        return time.monotonic() >= self.end_s

    def collect(self) -> StepOutput:
        """Waits until the device would have ended."""
        time.sleep(max(0.0, self.end_s - time.monotonic()))
        return self.output


class SimulatedRunner:
    """See `runner.Runner`. Sequences end at their length only."""

    pipeline_depth = 2

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._random = random.Random(0)
        # When the device will have done what was launched; None before the first iteration.
        self._free_s: float | None = None

    def launch(
        self, chunks: list[Chunk], decode_slots: list[int], slots: SlotTable
    ) -> _SimulatedStep:
        """Puts the iteration behind those before it."""
        now_s = time.monotonic()
        free_s = now_s if self._free_s is None else self._free_s
        busy_s = (
            _STEP_S
            + _SECONDS_PER_CONTEXT_TOKEN * sum(slots[slot].num_tokens for slot in decode_slots)
            + _SECONDS_PER_ROW * len(decode_slots)
            + _SECONDS_PER_PREFILL_TOKEN * sum(chunk.num_tokens for chunk in chunks)
        )
        self._free_s = max(now_s, free_s) + busy_s
        sampled = [chunk.slot for chunk in chunks if chunk.completes] + decode_slots
        owners = [slots[slot] for slot in sampled]
        return _SimulatedStep(
            self._free_s,
            StepOutput(
                slots=sampled,
                token_ids=[self._random.randrange(self._vocab_size) for _ in sampled],
                finish_flags=[
                    FINISH_LENGTH if owner.num_tokens + 1 >= owner.max_total_tokens else FINISH_NONE
                    for owner in owners
                ],
                logprobs=[],
                busy_s=busy_s,
                idle_s=max(0.0, now_s - free_s),
            ),
        )


def create_simulated_engine(directory: Path, settings: ExecutorSettings) -> Engine:
    """An engine without weights, for the vocabulary of the model in `directory`."""
    config = ModelConfig.from_directory(directory)
    limits = ExecutorLimits(
        vocab_size=config.vocab_size,
        num_blocks=settings.num_kv_blocks or _NUM_BLOCKS,
        block_size=settings.block_size or _BLOCK_SIZE,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens or _MAX_NUM_BATCHED_TOKENS,
        max_model_len=settings.max_model_len or min(_MAX_MODEL_LEN, config.max_position_embeddings),
    )
    return Engine(
        runner=SimulatedRunner(config.vocab_size),
        state=BatchState(limits, torch.device("cpu")),
        limits=limits,
        device_name="simulated",
        dtype_name="bfloat16",
        attention_backend="none",
        model_load_s=0.0,
        gpu_memory=None,
    )


def main() -> int:
    """Runs the executor; returns the exit code."""
    torch.set_num_threads(1)
    try:
        settings = ExecutorSettings.from_arguments(sys.argv[1:])
        start_logging(settings.log_level, settings.log_format)
        return serve(settings, create_simulated_engine)
    except StartupError as error:
        print(f"simulated_executor: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
