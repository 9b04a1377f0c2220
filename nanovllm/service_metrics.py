"""What the metrics of both services have in common: labels, build, process."""

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from nanovllm import __version__


class Relabelled(Collector):
    """Another collector's samples with further labels, and under another name if one is given.

    Args:
        source: The collector; it has a single metric if `name` is given.
        labels: Labels that every sample gets in addition to its own.
        name: The metric's new name, without `_total`.
        documentation: Its new description.
    """

    def __init__(
        self,
        source: Collector,
        labels: Mapping[str, str],
        name: str | None = None,
        documentation: str | None = None,
    ) -> None:
        self._source = source
        self._labels = dict(labels)
        self._name = name
        self._documentation = documentation

    def collect(self) -> Iterator[Metric]:
        """The metrics in exposition form."""
        for family in self._source.collect():
            name = self._name or family.name
            copy = Metric(name, self._documentation or family.documentation, family.type)
            for sample in family.samples:
                suffix = sample.name.removeprefix(family.name)
                if suffix != "_created":
                    copy.add_sample(name + suffix, {**sample.labels, **self._labels}, sample.value)
            yield copy


def new_registry(model_name: str) -> CollectorRegistry:
    """A registry with the build's version and the process's memory, CPU time and open files."""
    registry = CollectorRegistry()
    process = ProcessCollector(registry=None)
    registry.register(Relabelled(process, {"model_name": model_name}))
    Gauge(
        "nanovllm_build_info",
        "Version of the software as a label; the value is 1.",
        ["model_name", "version"],
        registry=registry,
    ).labels(model_name, __version__).set(1)
    return registry


def process_age_s() -> float:
    """Seconds since this process was started, loading of Python included. Linux only."""
    # Field 22 counts ticks since boot; the name in field 2 may contain spaces and parentheses.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
