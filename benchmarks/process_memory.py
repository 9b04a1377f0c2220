"""Memory of processes while something runs, from Linux's /proc."""

import asyncio
import statistics
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Resident memory of one process, in MiB, in equal steps of time."""

    samples_mib: tuple[float, ...]

    @property
    def growth_mib(self) -> float:
        """Median of the last quarter less that of the second one; the first is warm-up."""
        quarter = len(self.samples_mib) // 4
        if not quarter:
            return 0.0
        second = statistics.median(self.samples_mib[quarter : 2 * quarter])
        return statistics.median(self.samples_mib[-quarter:]) - second


class MemorySampler:
    """Samples processes by name while its block runs."""

    def __init__(self, pids: Mapping[str, int], interval_s: float) -> None:
        self._pids = dict(pids)
        self._interval_s = interval_s
        self._samples: dict[str, list[float]] = {name: [] for name in pids}
        self._task: asyncio.Task[None] | None = None

    @property
    def reports(self) -> dict[str, MemoryReport]:
        """What was sampled, by name."""
        return {name: MemoryReport(tuple(found)) for name, found in self._samples.items()}

    async def __aenter__(self) -> "MemorySampler":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            for name, pid in self._pids.items():
                self._samples[name].append(resident_mib(pid))
            await asyncio.sleep(self._interval_s)


def resident_mib(pid: int) -> float:
    """Resident memory of a process.

    Raises:
        OSError: There is no such process.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0
