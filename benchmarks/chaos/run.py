"""One run: an undisturbed pass over all cases, then the same cases again and again under faults."""

import asyncio
import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos.cases import Behaviour, Case, make_cases
from benchmarks.chaos.client import Ending, Outcome, Part, send
from benchmarks.chaos.faults import FAULTS, Ground, make_schedule
from benchmarks.chaos.stage import Stage
from benchmarks.chaos.verdict import Verdict, matches
from nanovllm.aio import AsyncClient
from nanovllm.resume import ResumePolicy
from nanovllm.server_info import ServerStatus

#: Rows of the tiny model's output matrix: as many as its tokenizer has entries. Ids without an
#: entry have no text; where they stand between the bytes of a broken character, the number of its
#: U+FFFD depends on how the tokens were cut into deltas.
VOCAB_SIZE = 259
# A request of which nothing came for this long is stuck: longer than any fault takes.
_STUCK_S = 180.0
_IDLE_LIMIT_S = 60.0
_POLL_S = 0.05
_MAX_GAP_S = 0.4


class ReferenceError(RuntimeError):
    """The undisturbed run went wrong; there is nothing to compare with."""


@dataclass(frozen=True, slots=True)
class ChaosOptions:
    """Size of a run."""

    num_faults: int
    num_requests: int
    num_cases: int = 60
    concurrency: int = 10
    seed: int = 0
    kinds: Sequence[str] = tuple(FAULTS)


@dataclass(slots=True)
class ChaosReport:
    """What a run showed."""

    verdict: Verdict = field(default_factory=Verdict)
    faults: Counter[str] = field(default_factory=Counter)
    failed_faults: list[str] = field(default_factory=list)
    # What was not given back when everything was over.
    leaks: list[str] = field(default_factory=list)
    # From an executor's being ready to the first token at a client, in seconds.
    recoveries_s: list[float] = field(default_factory=list)
    counters: Counter[str] = field(default_factory=Counter)
    duration_s: float = 0.0

    @property
    def is_clean(self) -> bool:
        """Whether every promise was kept."""
        return self.verdict.is_clean and not self.leaks and not self.failed_faults

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "is_clean": self.is_clean,
            "duration_s": self.duration_s,
            "faults": dict(self.faults),
            "failed_faults": self.failed_faults,
            "leaks": self.leaks,
            "executor_ready_to_first_token_s": self.recoveries_s,
            "scheduler_counters": dict(self.counters),
            **self.verdict.as_dict(),
        }

    def text(self) -> str:
        """For people."""
        verdict, recoveries_s = self.verdict, self.recoveries_s
        recovery = "no executor was started again"
        if recoveries_s:
            recovery = (
                f"p50 {statistics.median(recoveries_s):.2f} s, max {max(recoveries_s):.2f} s, "
                f"of {len(recoveries_s)}"
            )
        lines = [
            f"faults               {sum(self.faults.values())} in {self.duration_s:.0f} s",
            *(f"  {name:<22} {count}" for name, count in sorted(self.faults.items())),
            f"requests             {verdict.num_requests}, {verdict.num_tokens} tokens",
            *(f"  {name:<22} {count}" for name, count in verdict.behaviours.most_common()),
            f"ended                {_counts(verdict.endings)}",
            f"streams resumed      {verdict.num_resumes}",
            f"lost tokens          {verdict.num_lost_tokens}",
            f"repeated tokens      {verdict.num_repeated_tokens}",
            f"changed tokens       {verdict.num_changed_tokens}",
            f"wrong other fields   {verdict.num_wrong_fields}",
            f"ties                 {verdict.num_ties}",
            f"stuck                {verdict.endings[Ending.STUCK.value]}",
            f"leaks                {'; '.join(self.leaks) or 'none'}",
            f"failed faults        {'; '.join(self.failed_faults) or 'none'}",
            f"executor to token    {recovery}",
            f"schedulers counted   {_counts(self.counters)}",
            *(f"  {example}" for example in verdict.examples),
        ]
        return "\n".join(lines)


async def run_chaos(
    model: Path,
    log_dir: Path,
    options: ChaosOptions,
    on_fault: Callable[[int, str], None] = lambda number, name: None,
) -> ChaosReport:
    """Runs everything; `on_fault` is told of every fault before it. Raises ReferenceError."""
    stage = Stage(model, log_dir)
    cases = make_cases(options.num_cases, options.seed)
    report = ChaosReport()
    try:
        await stage.start()
        policy = ResumePolicy(max_wait_s=_STUCK_S)
        async with AsyncClient(stage.front.address, resume=policy) as client:
            expected = await _undisturbed(client, cases, options.concurrency)
            started_s = time.monotonic()
            outcomes = await _disturbed(stage, client, cases, options, report, on_fault)
            report.duration_s = time.monotonic() - started_s
            report.leaks = await _leaks(stage, client)
            await _judge(client, outcomes, expected, report.verdict)
        await stage.collect_counters()
        report.counters = stage.counters
        report.recoveries_s = stage.recoveries_s
    finally:
        await stage.close()
    return report


async def _undisturbed(
    client: AsyncClient, cases: Sequence[Case], concurrency: int
) -> dict[str, dict[int, Part]]:
    limit = asyncio.Semaphore(concurrency)

    async def one(case: Case) -> tuple[str, dict[int, Part]]:
        async with limit:
            return case.name, await _expected(client, case)

    return dict(await asyncio.gather(*(one(case) for case in cases)))


async def _expected(client: AsyncClient, case: Case) -> dict[int, Part]:
    plain = Case(case.name, case.prompt, case.params, 0, Behaviour.READ, 0)
    outcome = await send(client, plain, limit_s=_STUCK_S)
    if outcome.ending is not Ending.COMPLETE or outcome.num_resumes:
        raise ReferenceError(f"{case.name}: {outcome.ending.value} {outcome.error}")
    return outcome.parts


async def _disturbed(
    stage: Stage,
    client: AsyncClient,
    cases: Sequence[Case],
    options: ChaosOptions,
    report: ChaosReport,
    on_fault: Callable[[int, str], None],
) -> list[Outcome]:
    """Sends requests until there were enough and all faults have happened."""
    outcomes: list[Outcome] = []
    supply: Iterator[Case] = itertools.cycle(cases)
    faults_over = asyncio.Event()
    num_started = 0

    async def work() -> None:
        nonlocal num_started
        while num_started < options.num_requests or not faults_over.is_set():
            num_started += 1
            case = next(supply)
            outcomes.append(await send(client, case, limit_s=_STUCK_S, on_tokens=stage.on_tokens))

    async def disturb() -> None:
        try:
            await _make_faults(stage, options, report, on_fault)
        finally:
            faults_over.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(disturb())
        for _ in range(options.concurrency):
            group.create_task(work())
    return outcomes


async def _make_faults(
    stage: Stage,
    options: ChaosOptions,
    report: ChaosReport,
    on_fault: Callable[[int, str], None],
) -> None:
    rng = random.Random(options.seed)
    schedule = make_schedule(options.num_faults, options.kinds, rng)
    for number, name in enumerate(schedule, 1):
        await asyncio.sleep(rng.uniform(0, _MAX_GAP_S))
        on_fault(number, name)
        report.faults[name] += 1
        try:
            await FAULTS[name](Ground(stage, rng))
        except Exception as error:
            # The others go on; the run counts as failed.
            report.failed_faults.append(f"{name}: {error!r}")


async def _leaks(stage: Stage, client: AsyncClient) -> list[str]:
    """What is not given back although nobody wants anything any more."""
    status: ServerStatus | None = None
    num_active_slots = 0
    try:
        async with asyncio.timeout(_IDLE_LIMIT_S):
            while True:
                status = await client.server_status()
                num_active_slots = await stage.num_active_slots()
                if not num_active_slots and not _books(status):
                    return []
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        leaks = ["no status"] if status is None else _books(status)
        return leaks + ([f"{num_active_slots} slots of the executor"] if num_active_slots else [])


def _books(status: ServerStatus) -> list[str]:
    """What is wrong with the scheduler's books when nothing is live."""
    owned = status.num_kv_blocks - status.num_free_kv_blocks - status.num_cached_kv_blocks
    named = {
        "sequences run": status.num_running,
        "sequences wait": status.num_waiting,
        "KV blocks are owned": owned,
        "executors are missing": int(not status.executor_connected),
    }
    return [f"{count} {name}" for name, count in named.items() if count]


async def _judge(
    client: AsyncClient,
    outcomes: Sequence[Outcome],
    expected: dict[str, dict[int, Part]],
    verdict: Verdict,
) -> None:
    alone: dict[str, dict[int, Part]] = {}
    for outcome in outcomes:
        verdict.count(outcome)
        name = outcome.case.name
        if matches(outcome, expected[name]):
            continue
        # Sums differ in their last bits with the size of the batch, so where two tokens are as good
        # as equally likely, an undisturbed run can take the other one too.
        if name not in alone:
            alone[name] = await _expected(client, outcome.case)
        if matches(outcome, alone[name]):
            verdict.num_ties += 1
        else:
            verdict.compare(outcome, expected[name])


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.items()) or "none"
