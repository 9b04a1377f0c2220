"""The scheduler's engine with an executor that answers at once: what the engine itself costs.

No gRPC, no text and no model take part, so that small costs show.
"""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from nanovllm.v1 import executor_pb2, inference_pb2
from scheduler_service.engine import Engine, EngineLimits
from scheduler_service.executors.load import FleetLoad
from scheduler_service.executors.pool import ExecutorPool
from scheduler_service.live_request import LiveRequest
from scheduler_service.model_spec import DefaultSampling, ModelSpec
from scheduler_service.plan import FINISH_NONE, Plan, StepResult
from scheduler_service.scheduler import ExecutorCapacity
from scheduler_service.sequence import SlotId, StepId
from scheduler_service.settings import SchedulerSettings
from scheduler_service.telemetry.request_metrics import EngineMetrics
from scheduler_service.validation import TokenPrompt, validate_generate

_BLOCK_SIZE = 16
_PROMPT_LENS = (100, 400)
_VOCAB_SIZE = 50_000
_MODEL = ModelSpec(
    name="none",
    architecture="none",
    vocab_size=_VOCAB_SIZE,
    max_model_len=1 << 20,
    eos_token_ids=(),
    defaults=DefaultSampling(),
    fingerprint="",
)


class _NoText:
    """In the place of a tokenizer, which requests without text never ask."""


@dataclass(frozen=True, slots=True)
class EngineRun:
    """What it took to get tokens from results to the clients' deltas."""

    num_tokens: int
    cpu_s: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of processor time."""
        return self.num_tokens / self.cpu_s

    @property
    def us_per_token(self) -> float:
        """Microseconds of processor time for one token."""
        return self.cpu_s / self.num_tokens * 1e6


def run_engine(
    make_metrics: Callable[[FleetLoad], EngineMetrics], *, num_sequences: int, num_iterations: int
) -> EngineRun:
    """Decodes `num_sequences` requests together and times the iterations behind the prefill."""
    return asyncio.run(_run(make_metrics, num_sequences, num_iterations))


async def _run(
    make_metrics: Callable[[FleetLoad], EngineMetrics], num_sequences: int, num_iterations: int
) -> EngineRun:
    settings = SchedulerSettings(max_queued_requests=num_sequences)
    pool = ExecutorPool(settings.policy(), settings.routing(), settings.executor_wait_timeout_s)
    connection = pool.add_executor("unix:/executor")
    limits = EngineLimits(
        admission=settings.admission(),
        max_executor_losses=settings.max_executor_losses,
    )
    metrics = make_metrics(pool.load)
    engine = Engine(pool, _MODEL, _NoText(), metrics, limits)  # type: ignore[arg-type]
    plans: list[Plan] = []
    info = executor_pb2.GetExecutorInfoResponse()
    connection.on_connected(info, _capacity(num_sequences, num_iterations), plans.append)
    # Two tokens more than are made: nothing finishes.
    requests = [_submit(engine, index, num_iterations + 2) for index in range(num_sequences)]
    readers = [asyncio.create_task(_read(engine, request)) for request in requests]
    await _settle(requests)
    slots = [slot for plan in plans for slot, _ in plan.chunks]
    if len(slots) != num_sequences:
        raise RuntimeError(f"{len(slots)} of {num_sequences} prompts were planned at once")

    connection.on_results([_result(plans[-1].step_id, slots)])
    await _settle(requests)
    start_s = time.thread_time()
    for _ in range(num_iterations):
        connection.on_results([_result(plans[-1].step_id, slots)])
        await _settle(requests)
    cpu_s = time.thread_time() - start_s
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    return EngineRun(num_sequences * num_iterations, cpu_s)


def _capacity(num_sequences: int, num_iterations: int) -> ExecutorCapacity:
    longest = _PROMPT_LENS[1] + num_iterations + 2
    return ExecutorCapacity(
        # Room for the lookahead, and the watermark is left alone.
        num_blocks=num_sequences * (2 * longest // _BLOCK_SIZE + 10),
        block_size=_BLOCK_SIZE,
        max_num_seqs=num_sequences,
        max_num_batched_tokens=num_sequences * (_PROMPT_LENS[1] + 1),
        max_model_len=longest,
    )


def _submit(engine: Engine, index: int, max_tokens: int) -> LiveRequest:
    generator = random.Random(index)
    prompt = [generator.randrange(_VOCAB_SIZE) for _ in range(generator.randint(*_PROMPT_LENS))]
    spec = validate_generate(
        inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=prompt),
            sampling_params=inference_pb2.SamplingParams(max_tokens=max_tokens, detokenize=False),
        ),
        _MODEL,
    )
    if not isinstance(spec.prompt, TokenPrompt):
        raise TypeError("a request with token ids became one with text")
    with engine.reserve(spec) as reservation:
        return engine.submit(reservation, spec.prompt.token_ids)


async def _read(engine: Engine, request: LiveRequest) -> None:
    async for _ in engine.deltas(request):
        pass


async def _settle(requests: list[LiveRequest]) -> None:
    """Lets plans be made and readers take what there is."""
    await asyncio.sleep(0)
    while any(request.is_queued for request in requests):
        await asyncio.sleep(0)
    await asyncio.sleep(0)


def _result(step_id: StepId, slots: list[SlotId]) -> StepResult:
    return StepResult(
        applied_step_id=step_id,
        slots=list(slots),
        token_ids=[1] * len(slots),
        finish_flags=bytes([FINISH_NONE] * len(slots)),
    )
