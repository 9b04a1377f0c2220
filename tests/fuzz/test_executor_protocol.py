"""Nonsense between the services ends a session, in either direction, and nothing but a session."""

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_service.engine_factory import Engine, create_engine
from executor_service.metrics import ExecutorMetrics
from executor_service.plan_reader import PlanError, read_plan
from executor_service.session import EndReason, Session
from executor_service.settings import ExecutorSettings
from executor_service.worker import CloseSession, OpenSession, QueuedPlan, Worker
from nanovllm.v1 import executor_pb2 as pb
from nanovllm.wire import WireError
from scheduler_service.plan import Plan, decode_step_result, encode_plan
from scheduler_service.scheduler import ExecutorProtocolError
from scheduler_service.text.tokenizer import Tokenizer
from tests.executor_service.plans import admit
from tests.fuzz.messages import mutated, random_int32s, random_message
from tests.scheduler_service.engine_harness import EngineHarness

LIMIT_S = 30


def lawful_plan() -> pb.Plan:
    """What a scheduler may send first."""
    admits = [admit(slot, [1, 2, 3, 4, 5], [2 * slot, 2 * slot + 1]) for slot in range(3)]
    return encode_plan(Plan(1, admits=admits, chunks=[(slot, 5) for slot in range(3)]))


def spoiled(message: pb.Plan | pb.StepResult, rng: random.Random) -> pb.Plan | pb.StepResult:
    """The message with one field replaced, or all of it; whatever of it still parses."""
    kind = type(message)
    match rng.randrange(3):
        case 0:
            result = kind()
            try:
                result.ParseFromString(mutated(message.SerializeToString(), rng))
            except Exception:  # no message any more; gRPC does not even deliver it
                return kind()
            return result
        case 1:
            result = random_message(kind, rng, wildness=1.0)
        case _:
            result = kind()
            result.CopyFrom(message)
    _spoil_arrays(result, rng)
    return result


def _spoil_arrays(message, rng: random.Random) -> None:
    for field, value in message.ListFields():
        if field.type == field.TYPE_BYTES and rng.random() < 0.3:
            setattr(message, field.name, random_int32s(rng, 8))
        elif field.type == field.TYPE_MESSAGE:
            for child in value if field.is_repeated else [value]:
                _spoil_arrays(child, rng)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    arguments = [
        *("--model", str(checkpoint), "--device", "cpu", "--dtype", "float32"),
        *("--block-size", "4", "--num-kv-blocks", "40", "--max-num-seqs", "5"),
    ]
    return create_engine(checkpoint, ExecutorSettings.from_arguments(arguments))


@pytest.fixture(scope="module")
def worker(engine: Engine) -> Iterator[Worker]:
    """A worker that fails the tests if it takes a plan for a failure of the device."""
    failed = threading.Event()
    worker = Worker(engine.runner, engine.state, ExecutorMetrics("tiny"), failed.set)
    worker.start()
    yield worker
    assert not failed.is_set()
    worker.stop()


def run_session(worker: Worker, engine: Engine, plans: list[pb.Plan]) -> EndReason | None:
    """Reads plans as the servicer does; returns why the session ended, if it did by itself."""
    session = Session(1)
    worker.submit(OpenSession(session))
    assert session.wait_until_open()
    for plan in plans:
        try:
            worker.submit(QueuedPlan(session, read_plan(plan, engine.limits), 0.0))
        except PlanError as error:
            session.end(EndReason.PROTOCOL, str(error))
            break
    worker.submit(CloseSession(session))
    ended = threading.Thread(target=lambda: [None for _ in iter(session.take, None)], daemon=True)
    ended.start()
    ended.join(LIMIT_S)
    assert not ended.is_alive(), "the session neither goes on nor ends"
    return session.end_reason


@settings(max_examples=120)
@given(rng=st.randoms(use_true_random=False))
def test_a_wrong_plan_ends_its_session_and_the_next_one_runs(worker: Worker, engine: Engine, rng):
    plans = [lawful_plan()] if rng.random() < 0.7 else []
    for step_id in range(len(plans) + 1, len(plans) + 4):
        plan = spoiled(lawful_plan(), rng)
        # Otherwise the order of plans would be all that is ever refused.
        if rng.random() < 0.9:
            plan.step_id = step_id
        plans.append(plan)
    assert run_session(worker, engine, plans) in (EndReason.PROTOCOL, EndReason.CLOSED)
    assert run_session(worker, engine, [lawful_plan()]) is EndReason.CLOSED


def test_a_lawful_plan_does_not_end_its_session(worker: Worker, engine: Engine):
    assert run_session(worker, engine, [lawful_plan()]) is EndReason.CLOSED


@settings(max_examples=300)
@given(rng=st.randoms(use_true_random=False))
def test_a_wrong_step_result_is_decoded_or_refused(rng):
    lawful = pb.StepResult(
        applied_step_id=1,
        slots=bytes(8),
        token_ids=bytes(8),
        finish_flags=bytes(2),
        iteration=1,
        logprobs=pb.SlotLogprobs(slots=bytes(4), chosen=bytes(4), num_top=bytes(4)),
    )
    with contextlib.suppress(WireError):
        result = decode_step_result(spoiled(lawful, rng))
        assert len(result.slots) == len(result.token_ids) == len(result.finish_flags)


@pytest.fixture(scope="module")
def run(tokenizer: Tokenizer) -> Callable[..., None]:
    """Runs a scenario with a fresh engine, then checks that nothing is left behind."""

    def run_scenario(scenario) -> None:
        async def main() -> None:
            harness = EngineHarness(tokenizer, max_executor_losses=1000)
            await scenario(harness)
            await harness.check_nothing_is_left()

        asyncio.run(main())

    return run_scenario


@settings(max_examples=60)
@given(rng=st.randoms(use_true_random=False))
def test_results_that_no_plan_explains_cost_a_session_but_no_request(run, rng):
    async def scenario(h: EngineHarness) -> None:
        tasks = [
            h.read(h.submit([0, 1, 2], max_tokens=12, ignore_eos=True, logprobs=2, n=2))
            for _ in range(4)
        ]
        for _ in range(rng.randint(1, 6)):
            for _ in range(rng.randint(0, 4)):
                await h.step()
            await break_protocol(h, rng)
        await h.finish(*tasks)
        for task in tasks:
            deltas = task.result()
            for index in range(2):
                mine = [delta for delta in deltas if delta.index == index]
                assert sum(len(delta.token_ids) for delta in mine) == 12
                assert sum(len(delta.logprobs) for delta in mine) == 12

    run(scenario)


async def break_protocol(h: EngineHarness, rng: random.Random) -> None:
    """Reports a result with a field changed; a session that this ends is followed by another."""
    h.executor.run_iteration()
    results = list(h.executor.results)
    h.executor.results.clear()
    changed = [spoiled_result(result, rng) for result in results]
    try:
        h.connection.on_results(changed)
    except ExecutorProtocolError:
        h.lose_executor()
        h.scheduler.verify()
    else:
        # Not to be told from the truth by then: the executor is what is wrong now.
        h.lose_executor()
    h.connect()


def spoiled_result(result, rng: random.Random):
    numbers = (-1, 0, 1, 7, 8, 2**31 - 1)
    match rng.randrange(5):
        case 0:
            return replace(result, applied_step_id=rng.choice(numbers))
        case 1:
            return replace(result, slots=[rng.choice(numbers) for _ in result.slots])
        case 2:
            return replace(
                result, finish_flags=bytes(rng.choice((3, 9, 255)) for _ in result.slots)
            )
        case 3:
            return replace(result, logprobs={})
        case _:
            doubled = result.slots * 2
            return replace(
                result,
                slots=doubled,
                token_ids=result.token_ids * 2,
                finish_flags=result.finish_flags * 2,
            )
