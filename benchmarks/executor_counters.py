"""The executor's own account of its time: busy with iterations, or idle although it had work."""

import urllib.request
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

_BUSY = "nanovllm_gpu_busy_seconds_total"
_IDLE = "nanovllm_gpu_idle_seconds_total"
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ExecutorCounters:
    """Seconds since some moment."""

    busy_s: float
    idle_s: float

    @property
    def idle_share(self) -> float:
        """Idle time as a share of the time in which there was work."""
        total_s = self.busy_s + self.idle_s
        return self.idle_s / total_s if total_s > 0 else 0.0

    def since(self, earlier: "ExecutorCounters") -> "ExecutorCounters":
        """What was added since an earlier reading."""
        return ExecutorCounters(self.busy_s - earlier.busy_s, self.idle_s - earlier.idle_s)

    @classmethod
    def fetch(cls, url: str) -> "ExecutorCounters":
        """Reads a /metrics page.

        Raises:
            OSError: The page cannot be read.
            ValueError: It is not an executor's.
        """
        # Metrics are in the local network; a proxy could not reach them.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=_TIMEOUT_S) as response:
            text = response.read().decode()
        values = {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        return cls._of(values, url)

    @classmethod
    def read(cls, registry: CollectorRegistry) -> "ExecutorCounters":
        """Reads a registry of this process. Raises ValueError if it is not an executor's."""
        values = {
            sample.name: sample.value for family in registry.collect() for sample in family.samples
        }
        return cls._of(values, "the registry")

    @classmethod
    def _of(cls, values: dict[str, float], source: str) -> "ExecutorCounters":
        missing = [name for name in (_BUSY, _IDLE) if name not in values]
        if missing:
            raise ValueError(f"{source} has no {' and no '.join(missing)}: is it an executor's?")
        return cls(values[_BUSY], values[_IDLE])
