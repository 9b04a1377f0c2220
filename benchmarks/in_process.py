"""The same executor and the same scheduler in one process, without gRPC.

    python -m benchmarks.in_process --model smollm2-135m-instruct --scale 0.1

The baseline for the price of the split: the executor's worker thread gets its plans and gives its
results through queues instead of a stream. Plans and results are still packed and unpacked.
No text is made.
"""

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from itertools import count

from benchmarks.executor_counters import ExecutorCounters
from benchmarks.machine import describe_machine, machine_line
from benchmarks.options import add_engine_options, add_workload_options, workloads
from benchmarks.report import RequestsFailedError, Result, Run, check_run, format_table, write_json
from benchmarks.simulated_executor import create_simulated_engine
from benchmarks.workloads import Workload
from executor_service.engine_factory import Engine, create_engine
from executor_service.metrics import ExecutorMetrics
from executor_service.plan_reader import read_plan
from executor_service.session import Session
from executor_service.settings import ExecutorSettings
from executor_service.worker import OpenSession, QueuedPlan, Worker
from nanovllm.load import LoadReport, RequestTiming
from nanovllm.model_store import ModelNotFoundError, resolve_model
from nanovllm.service_settings import StartupError, freeze_heap
from scheduler_service.plan import decode_step_result, encode_plan
from scheduler_service.scheduler import ExecutorCapacity, Scheduler, SchedulerPolicy
from scheduler_service.sequence import Sequence as Completion
from scheduler_service.sequence import SequenceId, SlotSampling
from scheduler_service.settings import SchedulerSettings


class InProcessEngine:
    """Scheduler and worker, joined by queues. Use it as a context manager, from one thread."""

    def __init__(self, engine: Engine, policy: SchedulerPolicy, model_name: str) -> None:
        limits = engine.limits
        self._limits = limits
        self._metrics = ExecutorMetrics(model_name)
        self._failed = threading.Event()
        self._worker = Worker(engine.runner, engine.state, self._metrics, self._failed.set)
        self._session = Session(1)
        self._scheduler = Scheduler(policy)
        self._scheduler.attach(
            ExecutorCapacity(
                num_blocks=limits.num_blocks,
                block_size=limits.block_size,
                max_num_seqs=limits.max_num_seqs,
                max_num_batched_tokens=limits.max_num_batched_tokens,
                max_model_len=limits.max_model_len,
            )
        )
        self._ids = count()

    def __enter__(self) -> "InProcessEngine":
        self._worker.start()
        self._worker.submit(OpenSession(self._session))
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.stop()

    def run(self, workload: Workload, salt: str) -> Run:
        """Runs a workload once, with a prefix cache of its own for each `salt`.

        Raises:
            RequestsFailedError: The worker failed.
        """
        before = ExecutorCounters.read(self._metrics.registry)
        start_s = time.perf_counter()
        timings: dict[SequenceId, RequestTiming] = {}
        for request in workload.requests:
            seq = Completion(
                SequenceId(next(self._ids)),
                request.prompt_token_ids,
                max_total_tokens=len(request.prompt_token_ids) + request.max_tokens,
                sampling=SlotSampling(seed=len(timings), temperature=workload.temperature),
                arrival_s=time.monotonic(),
                cache_salt=salt,
            )
            timings[seq.seq_id] = RequestTiming(
                started_s=time.perf_counter() - start_s, num_prompt_tokens=seq.num_prompt_tokens
            )
            self._scheduler.add(seq)
        self._plan()
        num_live = len(timings)
        while num_live:
            num_live -= self._take_results(timings, start_s)
            self._plan()
        report = check_run(workload, LoadReport.of(list(timings.values())))
        return Run(report, ExecutorCounters.read(self._metrics.registry).since(before))

    def _plan(self) -> None:
        while (plan := self._scheduler.schedule(time.monotonic())) is not None:
            order = read_plan(encode_plan(plan), self._limits)
            self._worker.submit(QueuedPlan(self._session, order, time.monotonic()))

    def _take_results(self, timings: dict[SequenceId, RequestTiming], start_s: float) -> int:
        """Takes in one message of results; returns how many sequences it finished."""
        message = self._session.take()
        if message is None:
            raise RequestsFailedError(f"the session ended: {self._session.end_message}")
        progressed: dict[SequenceId, tuple[Completion, int]] = {}
        for result in message.results:
            for seq in self._scheduler.update(decode_step_result(result))[0]:
                _, num_tokens = progressed.get(seq.seq_id, (seq, 0))
                progressed[seq.seq_id] = (seq, num_tokens + 1)
        now_s = time.perf_counter() - start_s
        num_finished = 0
        for seq, num_tokens in progressed.values():
            timing = timings[seq.seq_id]
            # `e2e_s` is the time of the last tokens until the end makes it the request's.
            if timing.ttft_s is None:
                timing.ttft_s = now_s - timing.started_s
            else:
                gap_s = now_s - timing.started_s - timing.e2e_s
                timing.itl_s.extend([gap_s / num_tokens] * num_tokens)
            timing.e2e_s = now_s - timing.started_s
            timing.num_deltas += 1
            timing.num_output_tokens += num_tokens
            timing.num_cached_tokens = seq.num_cached_tokens
            num_finished += seq.is_finished
        return num_finished


def load_engine(options: argparse.Namespace) -> tuple[Engine, SchedulerPolicy]:
    """What --model, --simulated-device, --executor-arg and --scheduler-arg ask for.

    Raises:
        ModelNotFoundError: There is no such model.
        StartupError: It cannot run with these arguments.
    """
    executor = ExecutorSettings.from_arguments(["--model", options.model, *options.executor_arg])
    scheduler = SchedulerSettings.from_arguments(["--model", options.model, *options.scheduler_arg])
    make_engine = create_simulated_engine if options.simulated_device else create_engine
    return make_engine(resolve_model(options.model), executor), scheduler.policy()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.in_process",
        description="Measures the executor without gRPC: the baseline for the price of the split.",
    )
    add_engine_options(parser)
    add_workload_options(parser)
    options = parser.parse_args(arguments)
    machine = describe_machine()
    try:
        engine, results = _measure(options)
    except (ValueError, RequestsFailedError, ModelNotFoundError, StartupError) as error:
        print(f"in_process: {error}", file=sys.stderr)
        return 1
    print(
        f"{options.model} in process, {engine.dtype_name} on {engine.device_name}, attention "
        f"{engine.attention_backend}, scale {options.scale:g}"
    )
    print(machine_line(machine))
    print(format_table(results))
    if options.json is not None:
        document = {
            "path": "in process",
            "machine": machine,
            "parameters": {
                name: getattr(options, name) for name in ("model", "scale", "runs", "no_warm_up")
            }
            | {"executor_args": options.executor_arg, "scheduler_args": options.scheduler_arg},
            "results": [result.as_dict() for result in results],
        }
        write_json(options.json, document)
    return 0


def _measure(options: argparse.Namespace) -> tuple[Engine, list[Result]]:
    engine, policy = load_engine(options)
    freeze_heap()
    limits = engine.limits
    results = []
    with InProcessEngine(engine, policy, options.model) as in_process:
        for workload in workloads(options, limits.vocab_size, limits.max_model_len):
            if not options.no_warm_up:
                in_process.run(workload, f"{workload.name} warm-up")
            runs = [
                in_process.run(workload, f"{workload.name} {number}")
                for number in range(options.runs)
            ]
            results.append(Result(workload, runs))
    return engine, results


if __name__ == "__main__":
    sys.exit(main())
