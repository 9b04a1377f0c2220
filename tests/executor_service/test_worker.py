"""The worker thread with a runner that needs no model."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from prometheus_client import CollectorRegistry

from executor_service.batch_state import (
    FINISH_LENGTH,
    FINISH_NONE,
    FINISH_NOT_RUN,
    FINISH_STOP_TOKEN,
    BatchState,
)
from executor_service.metrics import ExecutorMetrics
from executor_service.runner import SlotLogprobs, StepOutput
from executor_service.session import EndReason, Session
from executor_service.slots import Chunk, SlotTable
from executor_service.worker import CloseSession, OpenSession, QueuedPlan, Worker
from scheduler_service.plan import StepResult, decode_step_result
from scheduler_service.sequence import TokenLogprobs
from tests.executor_service.plans import LIMITS, admit, order

LIMIT_S = 20
# What the runner claims for every iteration.
IDLE_S = 3.0
STOP_TOKEN = 9


def token_at(slot: int, position: int) -> int:
    return (17 * slot + position) % 100 + 10


@dataclass
class Launch:
    chunks: list[Chunk]
    decode_slots: list[int]
    output: StepOutput
    failure: Exception | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def has_ended(self) -> bool:
        if self.failure is not None:
            raise self.failure
        return self.ended.is_set()

    def collect(self) -> StepOutput:
        assert self.ended.wait(LIMIT_S)
        if self.failure is not None:
            raise self.failure
        return self.output


@dataclass
class FakeRunner:
    """Decides at launch what the device would; a slot that finished does not run again."""

    pipeline_depth: int = 0
    launches: list[Launch] = field(default_factory=list)
    # One permit per launch, if set; `arrivals` counts those that came for one.
    permits: threading.Semaphore | None = None
    arrivals: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    failures: list[Exception] = field(default_factory=list)
    idle_s: float = IDLE_S
    stop_at: int | None = None
    # Whether iterations end by themselves.
    ends: bool = True
    _finished: set[int] = field(default_factory=set)

    def launch(self, chunks: list[Chunk], decode_slots: list[int], slots: SlotTable) -> Launch:
        self.arrivals.release()
        if self.permits is not None and not self.permits.acquire(timeout=LIMIT_S):
            raise TimeoutError("no permit")
        sampled = [chunk.slot for chunk in chunks if chunk.completes] + decode_slots
        flags = [self._flag(slots, slot) for slot in sampled]
        output = StepOutput(
            slots=sampled,
            token_ids=[token_at(slot, slots[slot].num_tokens) for slot in sampled],
            finish_flags=flags,
            logprobs=[
                SlotLogprobs(slot, -0.5, [1, 2, 3][:count], [-0.5, -1.0, -1.5][:count])
                for slot in sampled
                if (count := slots[slot].sampling.num_logprobs) >= 0
            ],
            busy_s=0.25,
            idle_s=self.idle_s,
        )
        launch = Launch(
            chunks, decode_slots, output, self.failures.pop() if self.failures else None
        )
        if self.ends:
            launch.ended.set()
        self.launches.append(launch)
        return launch

    def wait_for_launches(self, count: int) -> None:
        """Until that many more launches began."""
        for _ in range(count):
            assert self.arrivals.acquire(timeout=LIMIT_S)

    def _flag(self, slots: SlotTable, slot: int) -> int:
        state = slots[slot]
        if state.generation in self._finished:
            return FINISH_NOT_RUN
        flag = FINISH_NONE
        if state.num_tokens == self.stop_at:
            flag = FINISH_STOP_TOKEN
        elif state.num_tokens + 1 >= state.max_total_tokens:
            flag = FINISH_LENGTH
        if flag != FINISH_NONE:
            self._finished.add(state.generation)
        return flag


class Client:
    """A session whose results are taken as they come."""

    def __init__(self, worker: Worker, session_id: int = 1) -> None:
        self.session = Session(session_id)
        self._worker = worker
        self._results: queue.Queue[StepResult | None] = queue.Queue()
        self._step_id = 0
        worker.submit(OpenSession(self.session))
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        while (message := self.session.take()) is not None:
            for result in message.results:
                self._results.put(decode_step_result(result))
        self._results.put(None)

    def plan(self, **changes) -> None:
        self._step_id += 1
        self._worker.submit(
            QueuedPlan(self.session, order(self._step_id, **changes), time.monotonic())
        )

    def take(self, count: int) -> list[StepResult]:
        results = [self._results.get(timeout=LIMIT_S) for _ in range(count)]
        assert None not in results, f"the session ended: {self.session.end_message}"
        return results

    def rest(self) -> list[StepResult]:
        """Results up to the end of the session."""
        results = []
        while (result := self._results.get(timeout=LIMIT_S)) is not None:
            results.append(result)
        return results

    def nothing_more(self) -> bool:
        return self._results.empty()


@dataclass
class Bench:
    worker: Worker
    runner: FakeRunner
    state: BatchState
    registry: CollectorRegistry
    fatal: threading.Event

    def client(self, session_id: int = 1) -> Client:
        return Client(self.worker, session_id)

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, {"model_name": "tiny", **labels}) or 0.0


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def build(*, start: bool = True, **options) -> Bench:
        runner = FakeRunner(**options)
        state = BatchState(LIMITS, torch.device("cpu"))
        metrics = ExecutorMetrics("tiny")
        fatal = threading.Event()
        worker = Worker(runner, state, metrics, fatal.set)
        if start:
            worker.start()
            benches.append(Bench(worker, runner, state, metrics.registry, fatal))
            return benches[-1]
        return Bench(worker, runner, state, metrics.registry, fatal)

    yield build
    for bench in benches:
        if bench.runner.permits is not None:
            bench.runner.permits.release(1000)
        bench.worker.stop()


depths = pytest.mark.parametrize("pipeline_depth", [0, 1, 2])


def tokens_of(results: list[StepResult], slot: int) -> list[int]:
    return [
        token
        for result in results
        for owner, token in zip(result.slots, result.token_ids, strict=True)
        if owner == slot
    ]


def tokens_between(slot: int, first: int, last: int) -> list[int]:
    return [token_at(slot, position) for position in range(first, last + 1)]


@depths
def test_a_slot_decodes_without_plans_until_its_blocks_are_full_and_goes_on_when_granted(
    make, pipeline_depth
):
    bench = make(pipeline_depth=pipeline_depth)
    client = bench.client()
    client.plan(admits=[admit(2, [5, 6, 7], [10, 11])], chunks=[(2, 3)])
    # Eight positions hold KV; the token at position 8 is sampled but cannot be computed.
    results = client.take(6)
    assert tokens_of(results, 2) == tokens_between(2, 3, 8)
    assert [result.iteration for result in results] == [1, 2, 3, 4, 5, 6]
    assert {result.applied_step_id for result in results} == {1}
    client.plan(grants=[(2, [12])])
    results = client.take(4)
    assert tokens_of(results, 2) == tokens_between(2, 9, 12)
    assert {result.applied_step_id for result in results} == {2}
    assert bench.state.block_tables[2, :3].tolist() == [10, 11, 12]


@depths
def test_a_finished_slot_sends_nothing_more(make, pipeline_depth):
    bench = make(pipeline_depth=pipeline_depth)
    client = bench.client()
    client.plan(
        admits=[
            admit(0, [1, 2], [0, 1, 2, 3], max_total_tokens=5),
            admit(1, [1, 2], [4, 5, 6], max_total_tokens=13),
        ],
        chunks=[(0, 2), (1, 2)],
    )
    results = client.take(11)
    assert tokens_of(results, 0) == tokens_between(0, 2, 4)
    assert tokens_of(results, 1) == tokens_between(1, 2, 12)
    flags = [flag for result in results for flag in result.finish_flags]
    assert flags.count(FINISH_LENGTH) == 2
    assert FINISH_NOT_RUN not in flags
    client.plan(releases=[0, 1])
    assert client.take(1)[0].slots == []


@depths
def test_a_stop_token_ends_a_slot_whatever_was_launched_behind_it(make, pipeline_depth):
    bench = make(pipeline_depth=pipeline_depth, stop_at=6)
    client = bench.client()
    client.plan(admits=[admit(0, [1, 2], list(range(8)))], chunks=[(0, 2)])
    results = client.take(5)
    assert tokens_of(results, 0) == tokens_between(0, 2, 6)
    assert results[-1].finish_flags == bytes([FINISH_STOP_TOKEN])
    # A new owner of the slot is not taken for the old one.
    bench.runner.stop_at = None
    client.plan(
        releases=[0], admits=[admit(0, [1, 2, 3], [9], max_total_tokens=5)], chunks=[(0, 3)]
    )
    later = [result for result in client.take(2 + pipeline_depth)[-2:] if result.slots]
    assert tokens_of(later, 0) == tokens_between(0, 3, 4)
    assert {result.applied_step_id for result in later} == {2}


def test_a_late_result_of_a_former_owner_does_not_end_the_next_one(make):
    bench = make(start=False, pipeline_depth=1, stop_at=2)
    client = bench.client()
    client.plan(admits=[admit(0, [1, 2], [0])], chunks=[(0, 2)])
    # Launched before the first result, which says that the slot finished, is collected.
    client.plan(
        releases=[0], admits=[admit(0, [1, 2, 3], [1, 2], max_total_tokens=7)], chunks=[(0, 3)]
    )
    bench.worker.start()
    first, *others = client.take(5)
    bench.worker.stop()
    assert (first.applied_step_id, first.finish_flags) == (1, bytes([FINISH_STOP_TOKEN]))
    assert tokens_of(others, 0) == tokens_between(0, 3, 6)


def test_chunks_of_a_plan_run_before_the_next_plan_is_applied(make):
    bench = make(start=False)
    client = bench.client()
    client.plan(admits=[admit(0, [1] * 8, [0, 1])], chunks=[(0, 5)])
    client.plan(chunks=[(0, 3)])
    client.plan(releases=[0], admits=[admit(0, [2] * 4, [5])], chunks=[(0, 4)])
    bench.worker.start()
    results = client.take(3)
    bench.worker.stop()
    chunks = [[(c.slot, c.start, c.end) for c in item.chunks] for item in bench.runner.launches]
    assert chunks[:3] == [[(0, 0, 5)], [(0, 5, 8)], [(0, 0, 4)]]
    assert [result.applied_step_id for result in results] == [1, 2, 3]
    assert [result.token_ids for result in results] == [[], [token_at(0, 8)], [token_at(0, 4)]]


def test_a_plan_is_launched_behind_an_iteration_that_still_runs(make):
    bench = make(pipeline_depth=2, ends=False)
    client = bench.client()
    # Prompts that do not complete: nothing can run but what plans bring.
    client.plan(admits=[admit(0, [1] * 6, [0, 1])], chunks=[(0, 4)])
    bench.runner.wait_for_launches(1)
    client.plan(grants=[(0, [2])])
    deadline_s = time.monotonic() + LIMIT_S
    while int(bench.state.ints("capacity")[0]) < 12:
        assert time.monotonic() < deadline_s, "a plan without chunks was not applied"
        time.sleep(0.001)
    client.plan(admits=[admit(1, [1] * 6, [4, 5])], chunks=[(1, 4)])
    bench.runner.wait_for_launches(1)
    assert client.nothing_more()
    for step_id, launch in zip((1, 3), bench.runner.launches, strict=True):
        launch.ended.set()
        (result,) = client.take(1)
        assert result.applied_step_id == step_id


def test_a_worker_whose_iterations_still_run_ends_at_once(make):
    bench = make(pipeline_depth=2, ends=False)
    client = bench.client()
    client.plan(admits=[admit(0, [1] * 6, [0, 1])], chunks=[(0, 4)])
    bench.runner.wait_for_launches(1)
    assert bench.worker.stop(LIMIT_S)
    assert client.rest() == []


def test_a_chunk_is_mixed_with_the_slots_that_decode(make):
    bench = make(permits=threading.Semaphore(2))
    client = bench.client()
    client.plan(admits=[admit(0, [1, 2], [0, 1, 2, 3])], chunks=[(0, 2)])
    bench.runner.wait_for_launches(3)
    client.plan(admits=[admit(1, [1] * 6, [6, 7])], chunks=[(1, 4)])
    bench.runner.permits.release(2)
    results = client.take(4)
    assert results[-1].applied_step_id == 2
    assert results[-1].slots == [0]
    launch = bench.runner.launches[3]
    assert launch.decode_slots == [0]
    assert [(chunk.slot, chunk.completes) for chunk in launch.chunks] == [(1, False)]


def test_plans_without_chunks_are_applied_together_and_acknowledged(make):
    bench = make(start=False)
    client = bench.client()
    client.plan(admits=[admit(0, [1], [0])])
    client.plan(grants=[(0, [1])])
    client.plan(releases=[0])
    bench.worker.start()
    (result,) = client.take(1)
    bench.worker.stop()
    assert (result.applied_step_id, result.iteration, result.slots) == (3, 0, [])
    assert bench.runner.launches == []
    assert client.rest() == []


def test_blocks_granted_in_the_plan_that_admits_a_slot_follow_its_own(make):
    bench = make()
    client = bench.client()
    client.plan(admits=[admit(3, [1] * 9, [20, 21, 22])], grants=[(3, [23, 24])])
    client.take(1)
    assert bench.state.block_tables[3, :5].tolist() == [20, 21, 22, 23, 24]
    assert int(bench.state.ints("capacity")[3]) == 20
    client.plan(releases=[3], admits=[admit(3, [1], [30])], grants=[(3, [31])])
    client.take(1)
    assert bench.state.block_tables[3, :2].tolist() == [30, 31]
    assert int(bench.state.ints("capacity")[3]) == 8


@depths
def test_a_newer_session_fences_the_older_and_sees_none_of_its_results(make, pipeline_depth):
    bench = make(pipeline_depth=pipeline_depth, permits=threading.Semaphore(0))
    old = bench.client(1)
    old.plan(admits=[admit(0, [1, 2], list(range(20)))], chunks=[(0, 2)])
    bench.runner.permits.release(5)
    old.take(5 - pipeline_depth)
    new = bench.client(2)
    old.plan(releases=[0])
    new.plan(admits=[admit(4, [7], [0], max_total_tokens=3)], chunks=[(4, 1)])
    bench.runner.permits.release(10)
    results = new.take(2)
    old.rest()
    assert old.session.end_reason is EndReason.FENCED
    assert [result.slots for result in results] == [[4], [4]]
    assert [result.iteration for result in results] == [1, 2]
    assert not new.session.ended


def test_a_plan_that_breaks_the_protocol_ends_its_session_but_not_the_worker(make):
    bench = make()
    client = bench.client()
    client.plan(releases=[3])
    assert client.rest() == []
    assert client.session.end_reason is EndReason.PROTOCOL
    assert "slot 3" in client.session.end_message
    again = bench.client(2)
    again.plan(admits=[admit(0, [1], [0], max_total_tokens=2)], chunks=[(0, 1)])
    assert again.take(1)[0].token_ids == [token_at(0, 1)]
    assert not bench.fatal.is_set()


@depths
@pytest.mark.parametrize("completes", [True, False])
def test_a_failed_iteration_ends_the_session_and_reports_the_device(
    make, pipeline_depth, completes
):
    bench = make(pipeline_depth=pipeline_depth, failures=[RuntimeError("CUDA error")])
    client = bench.client()
    # If the prompt does not complete, the worker waits for a plan or for the iteration's end.
    client.plan(admits=[admit(0, [1] * (1 if completes else 2), [0, 1])], chunks=[(0, 1)])
    assert client.rest() == []
    assert client.session.end_reason is EndReason.FAILED
    assert "RuntimeError" in client.session.end_message
    assert bench.fatal.wait(LIMIT_S)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_device_that_cannot_even_be_cleared_is_reported(make, monkeypatch):
    bench = make(failures=[RuntimeError("CUDA error")])
    client = bench.client()
    client.plan(admits=[admit(0, [1], [0, 1])])
    client.take(1)

    def clear() -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(bench.state, "clear", clear)
    client.plan(chunks=[(0, 1)])
    client.rest()
    assert client.session.end_reason is EndReason.FAILED
    assert bench.fatal.wait(LIMIT_S)


def test_a_closed_session_frees_its_slots(make):
    bench = make()
    client = bench.client()
    client.plan(admits=[admit(0, [1], [0])], chunks=[(0, 1)])
    client.take(4)
    bench.worker.submit(CloseSession(client.session))
    client.rest()
    assert client.session.end_reason is EndReason.CLOSED
    again = bench.client(2)
    again.plan(admits=[admit(0, [1], [0])], chunks=[(0, 1)])
    again.take(4)
    # Closing what is over already does not touch the next session.
    bench.worker.submit(CloseSession(client.session))
    again.plan(releases=[0])
    assert again.take(1)[0].applied_step_id == 2


def test_stopping_ends_the_session_with_its_reason(make):
    bench = make(start=False)
    client = bench.client()
    bench.worker.start()
    bench.worker.stop()
    client.rest()
    assert client.session.end_reason is EndReason.SHUTDOWN


@depths
def test_idle_time_counts_only_while_a_slot_could_have_run(make, pipeline_depth):
    bench = make(pipeline_depth=pipeline_depth)
    client = bench.client()
    client.plan(admits=[admit(0, [1, 2, 3, 4], [0, 1])], chunks=[(0, 4)])
    idle_us = int(IDLE_S * 1e6)
    # The wait for the first plan is nobody's fault, and neither is one for a grant.
    assert [result.idle_time_us for result in client.take(5)] == [0] + [idle_us] * 4
    client.plan(grants=[(0, [2])])
    assert [result.idle_time_us for result in client.take(4)] == [0] + [idle_us] * 3
    assert bench.metric("nanovllm_gpu_idle_seconds_total") == pytest.approx(7 * IDLE_S)
    assert bench.metric("nanovllm_gpu_busy_seconds_total") == pytest.approx(9 * 0.25)


def test_time_after_a_release_took_the_work_away_is_not_idle_time(make):
    bench = make(permits=threading.Semaphore(2))
    client = bench.client()
    client.plan(admits=[admit(0, [1], list(range(20)))], chunks=[(0, 1)])
    bench.runner.wait_for_launches(3)
    client.plan(releases=[0])
    bench.runner.permits.release(1)
    # Three iterations, then the acknowledgement of the release.
    assert client.take(4)[-1].slots == []
    client.plan(admits=[admit(0, [1], [0], max_total_tokens=2)], chunks=[(0, 1)])
    bench.runner.permits.release(1)
    assert client.take(1)[0].idle_time_us == 0


def test_a_pause_of_hours_does_not_overflow_the_wire(make):
    bench = make(idle_s=2 * 3600.0)
    client = bench.client()
    client.plan(admits=[admit(0, [1], [0])], chunks=[(0, 1)])
    assert client.take(4)[-1].idle_time_us == 2**32 - 1


def test_log_probabilities_reach_the_scheduler_for_the_slots_that_asked(make):
    bench = make()
    client = bench.client()
    client.plan(
        admits=[
            admit(0, [1], [0], max_total_tokens=2, num_logprobs=2),
            admit(1, [1], [1], max_total_tokens=2),
            admit(2, [1], [2], max_total_tokens=2, num_logprobs=0),
        ],
        chunks=[(0, 1), (1, 1), (2, 1)],
    )
    (result,) = client.take(1)
    assert result.logprobs == {
        0: TokenLogprobs(-0.5, [1, 2], [-0.5, -1.0]),
        2: TokenLogprobs(-0.5, [], []),
    }


def test_iterations_and_their_tokens_are_counted_by_kind(make):
    bench = make(start=False)
    client = bench.client()
    client.plan(admits=[admit(0, [1, 1], [0])], chunks=[(0, 2)])
    client.plan(admits=[admit(1, [1, 1], [1], max_total_tokens=3)], chunks=[(1, 2)])
    bench.worker.start()
    client.take(3)
    bench.worker.stop()
    name = "nanovllm_step_duration_seconds_count"
    for kind, batch, num_tokens in (("prefill", "1", 2), ("mixed", "2-8", 3), ("decode", "1", 1)):
        assert bench.metric(name, kind=kind, batch=batch) == 1
        assert bench.metric("nanovllm_step_tokens_total", kind=kind) == num_tokens
    assert bench.metric("nanovllm_plan_queue_delay_seconds_count") == 2


def test_a_plan_that_leaves_nothing_to_run_is_reported_after_what_was_launched_before(make):
    bench = make(pipeline_depth=2, permits=threading.Semaphore(2))
    client = bench.client()
    client.plan(admits=[admit(0, [1], list(range(20)))], chunks=[(0, 1)])
    # Two iterations are launched and none is collected when the release takes the work away.
    bench.runner.wait_for_launches(3)
    client.plan(releases=[0])
    bench.runner.permits.release(1)
    results = client.take(4)
    assert [result.iteration for result in results] == [1, 2, 3, 0]
    assert [result.applied_step_id for result in results] == [1, 1, 1, 2]


def test_a_failure_outside_an_iteration_is_fatal_too(make, monkeypatch):
    bench = make()

    def fail() -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(bench.state, "clear", fail)
    bench.worker.submit(OpenSession(Session(1)))
    assert bench.fatal.wait(LIMIT_S)
    assert bench.worker.stop(LIMIT_S)
