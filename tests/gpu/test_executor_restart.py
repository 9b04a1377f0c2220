"""An executor on the GPU that is killed and started again while requests run."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from nanovllm import DeltaStream, Health, SamplingParams
from tests.e2e.support import LIMIT_S, greedy, random_prompt, wait_until
from tests.gpu.conftest import Tiny
from tests.gpu.support import FLOAT32_MARGIN, NEEDS_GPU, Served, served_on_gpu

pytestmark = NEEDS_GPU

# At a tenth of a millisecond a token, a few hundred milliseconds to interfere in.
NUM_TOKENS = 3000
TEMPERATURE = 5.0
SEED = 7


@pytest.fixture
def served(
    tiny: Callable[[str, str], Tiny], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    model = tiny("qwen3", "float32")
    with served_on_gpu(
        model.checkpoint,
        model.oracle,
        tmp_path_factory.mktemp("logs"),
        dtype="float32",
        backend="triton",
        executor=["--num-kv-blocks", "256", "--max-num-seqs", "4"],
    ) as running:
        yield running


def read_tokens(stream: DeltaStream, at_least: int | None = None) -> list[int]:
    """Reads to the end, or until so many tokens came."""
    token_ids: list[int] = []
    for delta in stream:
        token_ids += delta.token_ids
        if at_least is not None and len(token_ids) >= at_least:
            break
    return token_ids


def test_requests_resume_after_the_executor_was_killed_without_gap_or_repeat(
    served: Served,
) -> None:
    before = served.scheduler_metrics()["executor_restarts_total"]
    prompts = [random_prompt(20 + 30 * index, seed=100 + index) for index in range(4)]
    sampled = SamplingParams(
        temperature=TEMPERATURE, seed=SEED, max_tokens=NUM_TOKENS, ignore_eos=True
    )
    params = [*[greedy(NUM_TOKENS)] * 3, sampled]
    with ExitStack() as stack:
        streams = [
            stack.enter_context(served.client.stream(prompt, wanted))
            for prompt, wanted in zip(prompts, params, strict=True)
        ]
        outputs = [read_tokens(stream, at_least=20) for stream in streams]
        assert served.client.server_status().num_running == len(streams), (
            "requests ended before the test interfered; let them run for longer"
        )
        served.services.executor.kill()
        assert served.services.executor.wait(LIMIT_S) == -signal.SIGKILL
        wait_until(lambda: served.client.health() is Health.NOT_SERVING, "the loss is noticed")
        served.services.executor.restart(4 * LIMIT_S)
        for output, stream in zip(outputs, streams, strict=True):
            output += read_tokens(stream)
    assert served.scheduler_metrics()["executor_restarts_total"] == before + 1
    assert [len(output) for output in outputs] == [NUM_TOKENS] * len(outputs)
    for prompt, output in zip(prompts[:-1], outputs[:-1], strict=True):
        served.expect_greedy(prompt, output)
    drawn = served.oracle.drawing_regrets(prompts[-1], outputs[-1], TEMPERATURE, SEED)
    assert drawn.max().item() < FLOAT32_MARGIN
