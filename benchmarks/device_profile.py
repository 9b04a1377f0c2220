"""A runner that profiles some of its iterations, and what the profiler saw of the device."""

import re
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

from executor_service.runner import PendingStep, Runner
from executor_service.slots import Chunk, SlotTable

# Of a demangled C++ signature: return type, namespaces, and the parameters behind name or template.
_NOISE = re.compile(r"^void |\(anonymous namespace\)::|\w+::|(?<=[\w>])\(.*")


@dataclass(frozen=True, slots=True)
class Activity:
    """All runs of one kernel, copy or operator; figures are per iteration."""

    name: str
    calls: float
    total_us: float

    @property
    def mean_us(self) -> float:
        """Of one run."""
        return self.total_us / self.calls

    @property
    def short_name(self) -> str:
        """Without the namespaces and parameters of a C++ signature."""
        return _NOISE.sub("", self.name) if "(" in self.name else self.name


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """Steady decode iterations; times are per iteration."""

    num_streams: int
    num_iterations: int
    # What the activities are: GPU kernels and copies, or CPU operators.
    kind: str
    # Longest total first.
    activities: list[Activity]
    # Time in which at least one activity ran: less than the sum of all where they overlap.
    busy_us: float
    # From the first activity's start to the last one's end.
    profiled_wall_us: float
    # Between launches of as many iterations before the profiler was started.
    wall_us: float

    @property
    def sum_us(self) -> float:
        """Of all activities."""
        return sum(item.total_us for item in self.activities)

    @property
    def idle_share(self) -> float:
        """Share of the wall time without the profiler that the activities do not account for."""
        return max(0.0, 1 - self.busy_us / self.wall_us)

    @property
    def profiled_idle_share(self) -> float:
        """Share of the profiled time in which nothing ran."""
        return 1 - self.busy_us / self.profiled_wall_us

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {
            "sum_us": self.sum_us,
            "idle_share": self.idle_share,
            "profiled_idle_share": self.profiled_idle_share,
        }


class ProfilingRunner:
    """A `Runner` around another; profiles iterations in which all streams decode and nothing else.

    After `num_warm_up` of them it times `num_iterations`, then profiles as many. Both happen in the
    worker thread, because the profiler sees operators of the thread that started it.
    """

    def __init__(
        self,
        runner: Runner,
        device: torch.device,
        *,
        num_streams: int,
        num_warm_up: int,
        num_iterations: int,
    ) -> None:
        self.pipeline_depth = runner.pipeline_depth
        self._runner = runner
        self._device = device
        self._num_streams = num_streams
        self._num_warm_up = num_warm_up
        self._num_iterations = num_iterations
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # The first start sets the profiler up, which takes seconds on a GPU and wants to happen in
        # the main thread.
        with torch.profiler.profile(activities=activities):
            pass
        self._profiler = torch.profiler.profile(activities=activities, acc_events=True)
        # Steady iterations so far.
        self._num_steady = 0
        self._started_s = 0.0
        self._wall_s = 0.0

    def launch(self, chunks: list[Chunk], decode_slots: list[int], slots: SlotTable) -> PendingStep:
        """Starts the iteration; see `Runner`."""
        if not chunks and len(decode_slots) == self._num_streams:
            self._enter_steady_iteration()
        return self._runner.launch(chunks, decode_slots, slots)

    def profile(self, trace: Path | None) -> DeviceProfile:
        """What was seen, once the workload has ended; also written as a Chrome trace if wanted.

        Raises:
            ValueError: There were too few steady iterations.
        """
        needed = self._num_warm_up + 2 * self._num_iterations
        if self._num_steady <= needed:
            raise ValueError(
                f"{self._num_streams} streams decoded together in {self._num_steady} iterations "
                f"only, {needed + 1} are needed; lower --streams or --prompt-len, or give the "
                "executor more KV blocks"
            )
        if trace is not None:
            self._profiler.export_chrome_trace(str(trace))
        on_gpu = self._device.type == "cuda"
        wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
        events = [
            event
            for event in self._profiler.events() or ()
            if event.device_type == wanted and not event.is_user_annotation
        ]
        if not events:
            raise ValueError("the profiler recorded nothing: does another one hold the device?")
        intervals = [(event.time_range.start, event.time_range.end) for event in events]
        count = self._num_iterations
        return DeviceProfile(
            num_streams=self._num_streams,
            num_iterations=count,
            kind="GPU kernel or copy" if on_gpu else "no GPU: CPU operator, self time",
            activities=_activities(events, count),
            busy_us=_union(intervals) / count,
            profiled_wall_us=(max(end for _, end in intervals) - min(intervals)[0]) / count,
            wall_us=self._wall_s * 1e6 / count,
        )

    def _enter_steady_iteration(self) -> None:
        done = self._num_steady - self._num_warm_up
        if done == 0:
            self._started_s = time.perf_counter()
        elif done == self._num_iterations:
            self._wall_s = time.perf_counter() - self._started_s
            # So that the trace holds whole iterations: stopping the profiler waits as well.
            self._synchronize()
            self._profiler.start()
        elif done == 2 * self._num_iterations:
            self._synchronize()
            self._profiler.stop()
        self._num_steady += 1

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _activities(events: Iterable[FunctionEvent], num_iterations: int) -> list[Activity]:
    times_us: defaultdict[str, list[float]] = defaultdict(list)
    for event in events:
        is_operator = event.device_type == DeviceType.CPU
        # An operator's range includes those that it calls.
        times_us[event.name].append(
            event.self_cpu_time_total if is_operator else event.time_range.elapsed_us()
        )
    found = [
        Activity(name, len(times) / num_iterations, sum(times) / num_iterations)
        for name, times in times_us.items()
    ]
    return sorted(found, key=lambda item: item.total_us, reverse=True)


def _union(intervals: list[tuple[float, float]]) -> float:
    """Length of what intervals cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
