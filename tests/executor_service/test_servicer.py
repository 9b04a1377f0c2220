"""The executor's gRPC service in this process, with a real tiny model behind it."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from executor_service.engine_factory import Engine, create_engine
from executor_service.metrics import ExecutorMetrics
from executor_service.servicer import ExecutorServicer
from executor_service.settings import ExecutorSettings
from executor_service.worker import Worker
from nanovllm.v1 import executor_pb2, executor_pb2_grpc
from scheduler_service.plan import Plan, StepResult, decode_step_result, encode_plan
from tests.checkpoints import make_checkpoint
from tests.executor_service.plans import admit

FINGERPRINT = "c" * 64
LIMIT_S = 30


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    directory = make_checkpoint(tmp_path_factory.mktemp("servicer"))
    settings = ExecutorSettings.from_arguments(
        [
            *("--model", str(directory), "--device", "cpu", "--dtype", "float32"),
            *("--block-size", "4", "--num-kv-blocks", "40", "--max-num-seqs", "5"),
        ]
    )
    return create_engine(directory, settings)


@dataclass
class Server:
    stub: executor_pb2_grpc.ExecutorServiceStub
    metrics: ExecutorMetrics
    epoch: int

    def num_active_slots(self) -> int:
        request = executor_pb2.GetExecutorInfoRequest()
        return self.stub.GetExecutorInfo(request, timeout=LIMIT_S).num_active_slots


@pytest.fixture
def server(engine: Engine, tmp_path: Path) -> Iterator[Server]:
    metrics = ExecutorMetrics("tiny")
    worker = Worker(engine.runner, engine.state, metrics, lambda: None)
    worker.start()
    grpc_server = grpc.server(ThreadPoolExecutor(8))
    executor_pb2_grpc.add_ExecutorServiceServicer_to_server(
        ExecutorServicer(engine, worker, metrics, FINGERPRINT), grpc_server
    )
    address = f"unix:{tmp_path}/executor.sock"
    grpc_server.add_insecure_port(address)
    grpc_server.start()
    with grpc.insecure_channel(address) as channel:
        stub = executor_pb2_grpc.ExecutorServiceStub(channel)
        info = stub.GetExecutorInfo(executor_pb2.GetExecutorInfoRequest(), timeout=LIMIT_S)
        yield Server(stub, metrics, info.epoch)
    worker.stop()
    grpc_server.stop(None).wait()


class Stream:
    """One Execute call."""

    def __init__(self, server: Server) -> None:
        self._requests: queue.Queue[executor_pb2.ExecuteRequest | None] = queue.Queue()
        self.call = server.stub.Execute(iter(self._requests.get, None), timeout=LIMIT_S)

    def send(self, **message) -> None:
        self._requests.put(executor_pb2.ExecuteRequest(**message))

    def start(self, epoch: int, **fields: int) -> "Stream":
        start = executor_pb2.StartSession(expected_epoch=epoch, session_id=1, **fields)
        self.send(start_session=start)
        assert next(self.call).session_started == executor_pb2.SessionStarted(
            epoch=epoch, session_id=1
        )
        return self

    def plan(self, plan: Plan) -> None:
        self.send(plan=encode_plan(plan))

    def take(self, count: int) -> list[StepResult]:
        results: list[StepResult] = []
        while len(results) < count:
            results += map(decode_step_result, next(self.call).step_results.results)
        return results

    def end(self) -> None:
        """The client has no more to say."""
        self._requests.put(None)

    def status(self) -> tuple[grpc.StatusCode, str]:
        """Reads to the end."""
        with contextlib.suppress(grpc.RpcError):
            for _ in self.call:
                pass
        self.end()
        return self.call.code(), self.call.details()


def test_the_description_is_that_of_the_engine(server: Server, engine: Engine):
    info = server.stub.GetExecutorInfo(executor_pb2.GetExecutorInfoRequest(), timeout=LIMIT_S)
    assert info.epoch == server.epoch != 0
    assert info.model_fingerprint == FINGERPRINT
    assert (info.vocab_size, info.block_size, info.num_blocks) == (320, 4, 40)
    assert (info.max_num_seqs, info.max_model_len) == (5, 512)
    assert info.max_num_batched_tokens == engine.limits.max_num_batched_tokens > 5
    assert (info.dtype, info.device, info.attention_backend) == ("float32", "cpu", "torch")


def test_results_come_as_the_scheduler_takes_them_in(server: Server):
    stream = Stream(server).start(server.epoch, max_messages_in_flight=1, heartbeat_interval_ms=50)
    stream.plan(Plan(1, admits=[admit(0, [1, 2, 3], [4, 5], max_total_tokens=8)], chunks=[(0, 3)]))
    first = next(stream.call).step_results.results
    num_tokens = len(first)
    # Whatever comes without an acknowledgement is a heartbeat.
    assert next(stream.call).WhichOneof("message") == "heartbeat"
    num_messages = 1
    while num_tokens < 5:
        stream.send(num_messages_taken=num_messages)
        response = next(stream.call)
        if response.HasField("step_results"):
            num_messages += 1
            num_tokens += len(response.step_results.results)
    stream.end()


def test_a_session_generates_from_plans_on_one_stream(server: Server):
    stream = Stream(server).start(server.epoch)
    stream.plan(Plan(1, admits=[admit(0, [1, 2, 3], [4, 5], max_total_tokens=8)], chunks=[(0, 3)]))
    results = stream.take(5)
    assert [result.slots for result in results] == [[0]] * 5
    assert [result.finish_flags[0] for result in results] == [0, 0, 0, 0, 2]
    stream.plan(Plan(2, releases=[0]))
    (released,) = stream.take(1)
    assert (released.applied_step_id, released.slots) == (2, [])
    stream.end()
    assert stream.status()[0] is grpc.StatusCode.CANCELLED


def test_another_epoch_is_refused(server: Server):
    stream = Stream(server)
    stream.send(start_session=executor_pb2.StartSession(expected_epoch=server.epoch + 1))
    code, details = stream.status()
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "GetExecutorInfo" in details


@pytest.mark.parametrize("message", ["plan", None])
def test_a_stream_that_does_not_begin_with_start_session_is_refused(server: Server, message):
    stream = Stream(server)
    if message is None:
        stream.end()
    else:
        stream.plan(Plan(1))
    code, details = stream.status()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "StartSession" in details


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (Plan(2), "plan 2 came after plan 0"),
        (Plan(1, releases=[3]), "slot 3"),
        (Plan(1, admits=[admit(9, [1], [1])]), "slot 9 does not exist"),
    ],
)
def test_a_plan_that_breaks_the_protocol_ends_the_stream_with_the_reason(
    server: Server, plan: Plan, problem: str
):
    stream = Stream(server).start(server.epoch)
    stream.plan(plan)
    code, details = stream.status()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert problem in details
    Stream(server).start(server.epoch).end()


def test_a_second_start_session_breaks_the_protocol(server: Server):
    stream = Stream(server).start(server.epoch)
    stream.send(start_session=executor_pb2.StartSession(expected_epoch=server.epoch))
    assert stream.status() == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "only plans may follow StartSession",
    )


def test_a_newer_session_ends_the_older_with_aborted_and_starts_with_free_slots(server: Server):
    old = Stream(server).start(server.epoch)
    old.plan(Plan(1, admits=[admit(0, [1, 2], [0])], chunks=[(0, 2)]))
    old.take(1)
    new = Stream(server).start(server.epoch)
    assert old.status() == (grpc.StatusCode.ABORTED, "a newer session took over")
    new.plan(Plan(1, admits=[admit(0, [1, 2], [0], max_total_tokens=3)], chunks=[(0, 2)]))
    (result,) = new.take(1)
    assert (result.iteration, result.slots, result.finish_flags) == (1, [0], b"\x02")
    new.end()


def test_a_cancelled_stream_frees_its_slots_for_the_next_session(server: Server, engine: Engine):
    stream = Stream(server).start(server.epoch)
    stream.plan(Plan(1, admits=[admit(0, [1, 2], list(range(40)))], chunks=[(0, 2)]))
    stream.take(1)
    stream.call.cancel()
    stream.end()
    again = Stream(server).start(server.epoch)
    again.plan(Plan(1, admits=[admit(0, [1], [0], max_total_tokens=2)], chunks=[(0, 1)]))
    assert again.take(1)[0].slots == [0]
    again.end()


def test_no_thread_outlives_its_session(server: Server):
    for _ in range(3):
        stream = Stream(server).start(server.epoch)
        stream.end()
        stream.status()
    readers = [thread for thread in threading.enumerate() if thread.name == "plans"]
    for reader in readers:
        reader.join(timeout=LIMIT_S)
        assert not reader.is_alive()
    assert (
        server.metrics.registry.get_sample_value("nanovllm_sessions_total", {"model_name": "tiny"})
        == 3
    )


def test_an_idle_session_beats_as_often_as_it_was_asked_to(server: Server):
    stream = Stream(server).start(server.epoch, heartbeat_interval_ms=5)
    assert next(stream.call).heartbeat == executor_pb2.Heartbeat()
    stream.plan(Plan(1, admits=[admit(0, [1, 2], [0], max_total_tokens=3)], chunks=[(0, 2)]))
    while not (response := next(stream.call)).HasField("step_results"):
        pass
    assert response.step_results.results[0].iteration == 1
    while not (response := next(stream.call)).HasField("heartbeat"):
        pass
    assert response.heartbeat.num_iterations == 1
    stream.end()


def test_a_session_starts_only_when_the_worker_can_take_it(
    server: Server, engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    busy, go_on = threading.Event(), threading.Event()
    launch = engine.runner.launch

    def hang(*arguments):
        busy.set()
        assert go_on.wait(LIMIT_S)
        return launch(*arguments)

    monkeypatch.setattr(engine.runner, "launch", hang)
    # Beats while the worker is busy: the sender's thread is not the one that hangs.
    first = Stream(server).start(server.epoch, heartbeat_interval_ms=5)
    first.plan(Plan(1, admits=[admit(0, [1], [0], max_total_tokens=2)], chunks=[(0, 1)]))
    assert busy.wait(LIMIT_S)
    assert next(first.call).HasField("heartbeat")
    second = Stream(server)
    second.send(start_session=executor_pb2.StartSession(expected_epoch=server.epoch, session_id=2))
    answered = threading.Thread(target=lambda: next(second.call), daemon=True)
    answered.start()
    assert next(first.call).HasField("heartbeat"), "the older session is open still"
    assert answered.is_alive()
    go_on.set()
    answered.join(LIMIT_S)
    assert not answered.is_alive()
    assert first.status()[0] is grpc.StatusCode.ABORTED
    second.end()


def test_the_description_counts_occupied_slots(server: Server):
    stream = Stream(server).start(server.epoch)
    admits = [admit(0, [1, 2], [0], max_total_tokens=3), admit(3, [1], [1])]
    stream.plan(Plan(1, admits=admits, chunks=[(0, 2)]))
    stream.take(1)
    assert server.num_active_slots() == 2
    stream.plan(Plan(2, releases=[0, 3]))
    stream.take(1)
    assert server.num_active_slots() == 0
    stream.end()


@pytest.mark.parametrize("step_id", [1, 3], ids=["twice", "gap"])
def test_a_plan_out_of_order_ends_its_session_and_leaves_the_next_one_alone(
    server: Server, step_id: int
):
    stream = Stream(server).start(server.epoch)
    stream.plan(Plan(1, admits=[admit(0, [1, 2], [0])], chunks=[(0, 2)]))
    stream.plan(Plan(step_id, releases=[0]))
    code, details = stream.status()
    assert (code, details) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        f"plan {step_id} came after plan 1",
    )
    again = Stream(server).start(server.epoch)
    again.plan(Plan(1, admits=[admit(0, [1, 2], [0], max_total_tokens=3)], chunks=[(0, 2)]))
    assert again.take(1)[0].slots == [0]
    again.end()


def test_plans_of_a_fenced_session_never_reach_the_newer_one(server: Server):
    old = Stream(server).start(server.epoch)
    new = Stream(server).start(server.epoch)
    for step_id in (1, 2, 3):
        old.plan(Plan(step_id, releases=[step_id]))
    assert old.status()[0] is grpc.StatusCode.ABORTED
    new.plan(Plan(1, admits=[admit(0, [1, 2], [0], max_total_tokens=3)], chunks=[(0, 2)]))
    assert new.take(1)[0].applied_step_id == 1
    new.end()
