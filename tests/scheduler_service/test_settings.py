"""Command line and environment of the scheduler."""

import pytest

from nanovllm.service_settings import StartupError
from scheduler_service.router import RoutingPolicy
from scheduler_service.scheduler import SchedulerPolicy
from scheduler_service.settings import SchedulerSettings


def test_the_defaults_are_the_policy_s_own():
    assert SchedulerSettings.from_arguments([]).policy() == SchedulerPolicy()


def test_every_policy_setting_reaches_the_policy():
    settings = SchedulerSettings.from_arguments(
        [
            *("--lookahead-tokens", "5", "--watermark-ratio", "0.2"),
            *("--priority-aging-s", "7.5", "--max-prefill-plans-in-flight", "3"),
            "--no-enable-prefix-caching",
        ]
    )
    assert settings.policy() == SchedulerPolicy(
        lookahead_tokens=5,
        watermark_ratio=0.2,
        priority_aging_s=7.5,
        max_prefill_plans_in_flight=3,
        enable_prefix_caching=False,
    )


def test_arguments_outrank_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NANOVLLM_SCHEDULER_EXECUTOR", "unix:/env")
    monkeypatch.setenv("NANOVLLM_SCHEDULER_MAX_QUEUED_REQUESTS", "9")
    settings = SchedulerSettings.from_arguments(["--executor", "unix:/argument"])
    assert (settings.executor, settings.max_queued_requests) == ("unix:/argument", 9)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-queued-requests", "0"),
        ("--watermark-ratio", "1"),
        ("--max-executor-losses", "-1"),
        ("--executor-stall-timeout-s", "0"),
        ("--max-prefill-plans-in-flight", "9"),
        ("--log-level", "loud"),
        ("--drain-timeout-s", "inf"),
        ("--executor-wait-timeout-s", "nan"),
    ],
)
def test_a_bad_value_is_refused_with_its_option(option: str, value: str):
    with pytest.raises(StartupError, match=option) as caught:
        SchedulerSettings.from_arguments([option, value])
    assert value in str(caught.value)


def test_a_unix_address_without_a_path_is_refused():
    with pytest.raises(StartupError, match="--listen: 'unix:' is no address"):
        SchedulerSettings.from_arguments(["--listen", "unix:"])


def test_connections_live_for_ever_unless_an_age_is_set():
    options = SchedulerSettings.from_arguments([]).connection_options()
    assert "grpc.max_connection_age_ms" not in options
    settings = SchedulerSettings.from_arguments(
        [
            *("--max-connection-age-s", "2.5", "--max-connection-age-grace-s", "10"),
            *("--keepalive-time-s", "3", "--keepalive-timeout-s", "0.5"),
            *("--max-calls-per-connection", "7"),
        ]
    )
    assert settings.connection_options() == {
        "grpc.max_concurrent_streams": 7,
        "grpc.keepalive_time_ms": 3000,
        "grpc.keepalive_timeout_ms": 500,
        "grpc.http2.ping_timeout_ms": 500,
        "grpc.max_connection_age_ms": 2500,
        "grpc.max_connection_age_grace_ms": 10_000,
    }


@pytest.mark.parametrize(
    ("arguments", "bound"),
    [([], 0), (["--max-queue-wait-s", "2.5"], 2.5), (["--max-queue-wait-s", "auto"], None)],
)
def test_the_wait_in_the_queue_is_bounded_when_asked_for(arguments, bound):
    assert SchedulerSettings.from_arguments(arguments).admission().max_queue_wait_s == bound


def test_several_executors_are_named_with_commas():
    settings = SchedulerSettings.from_arguments(["--executor", "unix:/a, 10.0.0.5:50052"])
    assert settings.executor_addresses == ["unix:/a", "10.0.0.5:50052"]


def test_executors_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NANOVLLM_SCHEDULER_EXECUTOR", "unix:/a,unix:/b")
    assert SchedulerSettings.from_arguments([]).executor_addresses == ["unix:/a", "unix:/b"]


@pytest.mark.parametrize(
    ("addresses", "problem"),
    [("unix:/a,unix:/a", "named twice"), ("unix:/a,", "is no address"), ("a,b", "is no address")],
)
def test_executors_that_cannot_be_told_apart_or_reached_are_refused(addresses: str, problem: str):
    with pytest.raises(StartupError, match=f"--executor: .*{problem}"):
        SchedulerSettings.from_arguments(["--executor", addresses])


def test_the_default_routing_is_the_router_s_own():
    assert SchedulerSettings.from_arguments([]).routing() == RoutingPolicy()
