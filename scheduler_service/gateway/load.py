"""How busy the engine is, for balancing over several."""

import time
from datetime import UTC, datetime

from smg_grpc_proto.generated import vllm_engine_pb2

from nanovllm import __version__
from scheduler_service.executors.load import FleetLoad
from scheduler_service.telemetry.metrics import SchedulerMetrics

# Polls that come closer together than this share a measurement.
_MIN_WINDOW_S = 0.5


class LoadReader:
    """Reads all executors as one; the throughput is that between one poll and the next."""

    def __init__(self, load: FleetLoad, metrics: SchedulerMetrics) -> None:
        self._fleet = load
        self._generated_tokens = metrics.counts["generation_tokens"]
        self._tokens_per_s = 0.0
        self._measured_s = time.monotonic()
        self._num_tokens = self._count_tokens()

    def read(self) -> vllm_engine_pb2.GetLoadsResponse:
        """The load now, of one rank."""
        self._measure(time.monotonic())
        return vllm_engine_pb2.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(),
            version=__version__,
            dp_rank_count=1,
            loads=[self._load()],
        )

    def _load(self) -> vllm_engine_pb2.SchedulerLoad:
        fleet, stats = self._fleet, self._fleet.stats
        load = vllm_engine_pb2.SchedulerLoad(
            num_running_reqs=fleet.num_running,
            num_waiting_reqs=fleet.num_waiting,
            num_total_reqs=fleet.num_running + fleet.num_waiting,
            gen_throughput=self._tokens_per_s,
            cache_hit_rate=stats.prefix_hit_tokens / max(1, stats.prefix_queried_tokens),
            # What of it is cached shows when it is admitted.
            num_waiting_uncached_tokens=fleet.num_waiting_prompt_tokens,
        )
        if fleet.is_connected:
            load.num_used_tokens = sum(each.num_owned * each.block_size for each in fleet.blocks)
            load.max_total_num_tokens = sum(each.max_kv_tokens for each in fleet.capacities)
            load.token_usage = fleet.kv_usage_ratio
            load.utilization = fleet.num_running / fleet.max_num_seqs
            load.max_running_requests = fleet.max_num_seqs
        return load

    def _measure(self, now_s: float) -> None:
        elapsed_s = now_s - self._measured_s
        if elapsed_s >= _MIN_WINDOW_S:
            num_tokens = self._count_tokens()
            self._tokens_per_s = (num_tokens - self._num_tokens) / elapsed_s
            self._measured_s, self._num_tokens = now_s, num_tokens

    def _count_tokens(self) -> float:
        return sum(
            sample.value
            for family in self._generated_tokens.collect()
            for sample in family.samples
            if sample.name.endswith("_total")
        )
