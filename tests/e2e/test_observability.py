"""Health, reflection, descriptions and metrics of the running services."""

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from prometheus_client.parser import text_string_to_metric_families

from nanovllm import Client, LocalServices, SamplingParams
from nanovllm.model_store import fingerprint
from tests.e2e.support import (
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    VOCAB_SIZE,
    Metrics,
    greedy,
    metrics_page,
    random_prompt,
    wait_until,
)

HEALTH = "grpc.health.v1.Health"


@pytest.fixture(params=["scheduler", "executor"])
def service(request: pytest.FixtureRequest, services: LocalServices) -> tuple[str, str]:
    """Address and full name of the own service of a process."""
    if request.param == "scheduler":
        return services.address, "nanovllm.v1.InferenceService"
    return services.executor_address, "nanovllm.v1.ExecutorService"


@pytest.fixture
def channel(service: tuple[str, str]) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(service[0]) as opened:
        yield opened


class TestHealth:
    def test_whole_process_and_own_service_are_serving(
        self, service: tuple[str, str], channel: grpc.Channel
    ) -> None:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", service[1]):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING

    def test_unknown_service_is_not_found(self, channel: grpc.Channel) -> None:
        stub = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=10)
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


class TestReflection:
    def test_services_are_listed(self, service: tuple[str, str], channel: grpc.Channel) -> None:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {service[1], HEALTH} <= set(database.get_services())

    def test_descriptor_of_the_own_service_is_complete(
        self, service: tuple[str, str], channel: grpc.Channel
    ) -> None:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        described = pool.FindServiceByName(service[1])
        methods = {method.name: method for method in described.methods}
        own = "Generate" if service[1].endswith("InferenceService") else "Execute"
        assert methods[own].output_type.fields
        assert methods[own].server_streaming


class TestDescriptions:
    def test_model_info_is_that_of_the_checkpoint(
        self, client: Client, checkpoint: Callable[[str], Path]
    ) -> None:
        info = client.model_info()
        assert info.model_name == "tiny-qwen3"
        assert info.architecture == "Qwen3ForCausalLM"
        assert (info.max_model_len, info.vocab_size) == (MAX_MODEL_LEN, VOCAB_SIZE)
        assert info.eos_token_ids == (258,)
        assert info.has_chat_template
        assert info.fingerprint == fingerprint(checkpoint("qwen3"))
        assert info.default_sampling_params == SamplingParams(
            temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0
        )

    def test_server_status_follows_the_load(self, client: Client, services: LocalServices) -> None:
        idle = client.server_status()
        assert (idle.num_kv_blocks, idle.kv_block_size) == (2048, 16)
        assert idle.executor is not None
        assert idle.executor.address == services.executor_address
        assert idle.executor.epoch > 0
        assert (idle.executor.device, idle.executor.dtype) == ("cpu", "float32")
        assert idle.executor.attention_backend == "torch"
        assert idle.executor.max_num_seqs == MAX_NUM_SEQS
        with client.stream(random_prompt(100), greedy(2000, n=MAX_NUM_SEQS + 2)) as stream:
            next(stream)
            wait_until(
                lambda: client.server_status().num_running == MAX_NUM_SEQS, "all slots are taken"
            )
            busy = client.server_status()
            assert busy.num_waiting == 2
            unowned = busy.num_free_kv_blocks + busy.num_cached_kv_blocks
            assert unowned < busy.num_kv_blocks
            assert busy.uptime_s > idle.uptime_s


#: What has to exist before the first request, too.
SCHEDULER_METRICS = (
    "time_to_first_token_seconds_count",
    "inter_token_latency_seconds_count",
    "e2e_request_latency_seconds_count",
    "request_queue_time_seconds_count",
    "request_prefill_time_seconds_count",
    "request_decode_time_seconds_count",
    "request_prompt_tokens_count",
    "request_generation_tokens_count",
    "iteration_tokens_count",
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_ratio",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "executor_restarts_total",
    "recomputed_tokens_total",
    "num_queued_tokens",
    "executor_connected",
    "executor_draining",
    "executor_slots",
    "requests_routed_total",
    "requests_moved_total",
    "executor_sessions_ended_total",
    "executor_round_trip_seconds_count",
    "plans_total",
    "scheduler_kv_blocks",
    "cache_config_info",
    "event_loop_lag_seconds_count",
    "build_info",
)
EXECUTOR_METRICS = (
    "gpu_busy_seconds_total",
    "gpu_idle_seconds_total",
    "plan_queue_delay_seconds_count",
    "results_queue_delay_seconds_count",
    "step_duration_seconds_count",
    "step_tokens_total",
    "kv_blocks",
    "slots_active",
    "build_info",
)


def settled_metrics(url: str | None) -> Metrics:
    """The executor's page when no slot is occupied, so that nothing runs any more."""
    readings = [Metrics(url)]

    def is_settled() -> bool:
        readings.append(Metrics(url))
        return readings[-1]["slots_active"] == 0

    wait_until(is_settled, "the executor is idle")
    return readings[-1]


class TestMetrics:
    def test_documented_names_are_served(self, services: LocalServices) -> None:
        scheduler = Metrics(services.scheduler.metrics_url)
        assert [name for name in SCHEDULER_METRICS if name not in scheduler] == []
        executor = Metrics(services.executor.metrics_url)
        assert [name for name in EXECUTOR_METRICS if name not in executor] == []
        assert executor["kv_blocks"] == 2048
        assert executor.value("kv_blocks", model_name="tiny-qwen3") == 2048
        assert 0 < executor["model_load_seconds"] < executor["startup_seconds"]
        assert scheduler.value("executor_connected", executor=services.executor_address) == 1
        assert scheduler["executor_slots"] == MAX_NUM_SEQS
        assert scheduler["scheduler_kv_blocks"] == 2048
        assert scheduler.value("cache_config_info", num_kv_blocks="2048", block_size="16") == 1

    def test_scheduler_counts_a_request_exactly(
        self, client: Client, services: LocalServices
    ) -> None:
        prompt, salt = random_prompt(50, seed=150), "metrics"
        client.generate(prompt, greedy(1), cache_salt=salt)
        before = Metrics(services.scheduler.metrics_url)
        client.generate(prompt, greedy(20), cache_salt=salt)
        after = Metrics(services.scheduler.metrics_url)

        def growth(name: str, **labels: str) -> float:
            return after.value(name, **labels) - before.value(name, **labels)

        assert growth("requests_total", finished_reason="length") == 1
        assert growth("requests_total") == 1
        assert growth("prompt_tokens_total") == 50
        assert growth("generation_tokens_total") == 20
        assert growth("prefix_cache_queries_total") == 50
        assert growth("prefix_cache_hits_total") == 48
        assert growth("time_to_first_token_seconds_count") == 1
        # Tokens that arrive together with the first one have no latency of their own.
        assert growth("inter_token_latency_seconds_count") == 19
        assert growth("e2e_request_latency_seconds_count") == 1
        assert growth("request_prompt_tokens_sum") == 50
        assert growth("request_generation_tokens_sum") == 20
        # Two prompt tokens behind the hit, then one token an iteration.
        assert growth("iteration_tokens_sum") == 2 + 19
        phases = sum(
            growth(f"request_{phase}_time_seconds_sum") for phase in ("queue", "prefill", "decode")
        )
        # Before the phases the request is looked at and its prompt encoded.
        assert 0 < phases <= growth("e2e_request_latency_seconds_sum")
        assert growth("requests_routed_total", executor=services.executor_address) == 1
        assert growth("requests_moved_total") == 0
        assert growth("plans_total") > 0
        assert growth("executor_round_trip_seconds_count") > 0

    def test_names_of_vllm_show_the_same_requests(
        self, client: Client, services: LocalServices
    ) -> None:
        def read() -> dict[str, float]:
            page = metrics_page(services.scheduler.metrics_url)
            return {
                sample.name: sample.value
                for family in text_string_to_metric_families(page)
                for sample in family.samples
                if sample.labels.get("finished_reason", "length") == "length"
                and "le" not in sample.labels
            }

        before = read()
        client.generate(random_prompt(50, seed=152), greedy(20))
        after = read()
        growth = {name: value - before.get(name, 0) for name, value in after.items()}
        assert growth["vllm:request_success_total"] == 1
        assert growth["vllm:prompt_tokens_total"] == 50
        assert growth["vllm:generation_tokens_total"] == 20
        assert growth["vllm:inter_token_latency_seconds_count"] == 19
        assert growth["vllm:request_params_max_tokens_sum"] == 20
        for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
            assert growth[f"vllm:{name}_sum"] == growth[f"nanovllm_{name}_sum"] > 0

    def test_aborted_and_refused_requests_are_counted_by_reason(
        self, client: Client, services: LocalServices
    ) -> None:
        before = Metrics(services.scheduler.metrics_url)
        with client.stream("abc", greedy(2000)) as stream:
            next(stream)
        with pytest.raises(ValueError, match="top_p"):
            client.generate("abc", SamplingParams(top_p=2.0))
        wait_until(lambda: client.server_status().num_running == 0, "the request has ended")
        after = Metrics(services.scheduler.metrics_url)
        for name, labels in (
            ("requests_total", {"finished_reason": "abort"}),
            ("admission_rejections_total", {"reason": "invalid_field"}),
        ):
            assert after.value(name, **labels) == before.value(name, **labels) + 1

    def test_gauges_follow_the_load(self, client: Client, services: LocalServices) -> None:
        with client.stream(random_prompt(200), greedy(2000, n=MAX_NUM_SEQS + 1)) as stream:
            next(stream)
            busy = Metrics(services.scheduler.metrics_url)
            assert busy["num_requests_running"] == MAX_NUM_SEQS
            assert busy["num_requests_waiting"] == 1
            assert 0 < busy["kv_cache_usage_ratio"] < 1

    def test_executor_accounts_for_its_time(self, client: Client, services: LocalServices) -> None:
        before = settled_metrics(services.executor.metrics_url)
        client.generate(random_prompt(150, seed=151), greedy(300))
        after = settled_metrics(services.executor.metrics_url)

        def growth(name: str, **labels: str) -> float:
            return after.value(name, **labels) - before.value(name, **labels)

        # 150 prompt tokens in chunks of at most 64.
        assert growth("step_duration_seconds_count", kind="prefill") == 3
        assert growth("step_duration_seconds_count", kind="decode") == 299
        assert growth("step_tokens_total", kind="prefill") == 150
        assert growth("step_tokens_total", kind="decode") == 299
        assert growth("results_queue_delay_seconds_count") == 302
        assert growth("plan_queue_delay_seconds_count") > 3
        busy_s = growth("gpu_busy_seconds_total")
        assert busy_s == pytest.approx(growth("step_duration_seconds_sum"), rel=0.01)
        # The decoding slot is never kept waiting for a plan. Other processes on the machine may
        # take the core away between two iterations, hence the generous bound.
        assert growth("gpu_idle_seconds_total") < 0.5 * busy_s
