"""Settings of the scheduler process: command line, then NANOVLLM_SCHEDULER_*, then defaults."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat
from pydantic_settings import SettingsConfigDict

from nanovllm.channel import check_address
from nanovllm.service_settings import MAX_CALLS_PER_CONNECTION, Address, ServiceSettings
from scheduler_service.admission import AdmissionLimits
from scheduler_service.router import RoutingPolicy
from scheduler_service.scheduler import SchedulerPolicy


def check_executor_address(address: str) -> str:
    """Returns the address of one executor. Raises ValueError."""
    if "," in address:
        raise ValueError("give one address; a comma separates those of several executors")
    return check_address(address.strip())


def _check_addresses(addresses: str) -> str:
    each = [check_executor_address(address) for address in addresses.split(",")]
    if len(set(each)) < len(each):
        raise ValueError("an executor is named twice; name each once")
    return ",".join(each)


class SchedulerSettings(ServiceSettings):
    """A gRPC scheduler that serves the public API and steers one executor or several."""

    model_config = SettingsConfigDict(
        env_prefix="NANOVLLM_SCHEDULER_", cli_prog_name="scheduler_service"
    )

    executor: Annotated[str, AfterValidator(_check_addresses)] = Field(
        "127.0.0.1:50052", description="Address of the executor, or of several: A,B,C."
    )
    listen: Address = Field("127.0.0.1:50051", description="Address to serve on; port 0 picks one.")
    metrics_port: int = Field(
        9401, ge=-1, le=65535, description="Port of /metrics; 0 picks one, -1 turns it off."
    )
    metrics_compat: Literal["none", "vllm"] = Field(
        "none", description="Whose names for metrics to serve beside our own."
    )

    max_queued_requests: int = Field(
        4096, ge=1, description="Sequences that may wait; more are refused with RESOURCE_EXHAUSTED."
    )
    max_queued_tokens: int = Field(
        16_777_216,
        ge=1,
        description="Tokens, prompt and max_tokens times n, that may wait; more are refused.",
    )
    max_queue_wait_s: NonNegativeFloat | Literal["auto"] = Field(
        0.0,
        description="Requests that would wait for longer are refused; 0: no bound; auto: half of "
        "the time that requests lately took to run.",
    )
    max_requests_per_client: int = Field(
        0, ge=0, description="Generate calls that one client may have under way; 0: no bound."
    )
    max_response_bytes: int = Field(
        1 << 30,
        ge=1,
        description="Memory that log-probabilities of all requests may need while nobody reads.",
    )
    max_tokenizing_bytes: int = Field(
        64 << 20, ge=1, description="Text that may wait for tokenization; more is refused."
    )
    write_timeout_s: float = Field(
        60.0, gt=0, description="A client that reads nothing for this long loses its request."
    )
    max_calls_per_connection: int = Field(
        MAX_CALLS_PER_CONNECTION,
        ge=1,
        description="Calls that one connection may have open; more wait or are refused.",
    )
    keepalive_time_s: float = Field(
        10.0, ge=1, description="A connection that is silent for this long is asked for a sign."
    )
    keepalive_timeout_s: float = Field(
        5.0, ge=0.1, description="A connection without an answer for this long is closed."
    )
    max_connection_age_s: float = Field(
        0.0,
        ge=0,
        description="Clients are sent to a new connection after this time; 0: never.",
    )
    max_connection_age_grace_s: float = Field(
        600.0, ge=0, description="Calls of a connection that is too old may go on for this long."
    )
    priority_aging_s: float = Field(
        30.0, gt=0, description="Seconds of waiting that weigh as much as one level of priority."
    )
    lookahead_tokens: int = Field(
        128, ge=0, description="Tokens of KV room granted ahead of each decoding sequence, at most."
    )
    watermark_ratio: float = Field(
        0.01, ge=0, lt=1, description="Share of the KV blocks that admissions leave free."
    )
    max_prefill_plans_in_flight: int = Field(
        2, ge=1, le=8, description="Plans with prefill chunks that may be on their way."
    )
    enable_prefix_caching: bool = Field(True, description="Whether prompts share computed KV.")

    max_executor_imbalance: int = Field(
        32,
        ge=0,
        description="Sequences that an executor may have beyond the least busy one because it has "
        "their prefix.",
    )

    executor_tls_ca: Path | None = Field(
        None, description="PEM file of the executor's authorities; turns TLS to it on."
    )
    executor_tls_cert: Path | None = Field(
        None, description="PEM file of the certificate that the executor is shown."
    )
    executor_tls_key: Path | None = Field(
        None, description="PEM file of that certificate's private key, not encrypted."
    )
    executor_tls_server_name: str | None = Field(
        None, description="Name in the executor's certificate, if not the address's host."
    )
    auth_tokens_file: Path | None = Field(
        None, description="File of name:token lines; calls need one of the tokens."
    )
    shared_prefix_cache: bool = Field(
        False, description="Whether authenticated callers share cached prefixes."
    )
    gateway: bool = Field(
        True,
        description="Serve vLLM's gRPC API on the same port, for gateways; needs the extra gateway "
        "and is left out without it.",
    )
    admin_listen: Address | None = Field(
        None, description="Address of the admin service; default: it is not served."
    )
    admin_tokens_file: Path | None = Field(
        None, description="File of name:token lines; admin calls need one of the tokens."
    )

    executor_wait_timeout_s: float = Field(
        60.0, gt=0, description="How long requests wait for an executor before UNAVAILABLE."
    )
    executor_silence_timeout_s: float = Field(
        4.0, gt=0, description="Without even a heartbeat for this long an executor counts as lost."
    )
    executor_stall_timeout_s: float = Field(
        60.0, gt=0, description="Without a result for this long a busy executor counts as lost."
    )
    max_executor_losses: int = Field(
        3, ge=0, description="Executor losses that one request survives before it fails."
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, description="How long running requests may go on after SIGTERM."
    )

    otlp_endpoint: str | None = Field(
        None,
        description="URL of an OTLP gRPC receiver of traces; default: no traces. Needs the extra "
        "tracing.",
    )
    log_prompts: bool = Field(
        False, description="Log the beginnings of prompts and outputs with each request."
    )

    @property
    def executor_addresses(self) -> list[str]:
        """Each executor's address."""
        return self.executor.split(",")

    def connection_options(self) -> dict[str, int | str]:
        """gRPC's options for the connections of clients."""
        timeout_ms = round(self.keepalive_timeout_s * 1000)
        options: dict[str, int | str] = {
            "grpc.max_concurrent_streams": self.max_calls_per_connection,
            "grpc.keepalive_time_ms": round(self.keepalive_time_s * 1000),
            "grpc.keepalive_timeout_ms": timeout_ms,
            "grpc.http2.ping_timeout_ms": timeout_ms,
        }
        if self.max_connection_age_s:
            options["grpc.max_connection_age_ms"] = round(self.max_connection_age_s * 1000)
            grace_ms = round(self.max_connection_age_grace_s * 1000)
            options["grpc.max_connection_age_grace_ms"] = grace_ms
        return options

    def admission(self) -> AdmissionLimits:
        """What may be under way."""
        return AdmissionLimits(
            max_queued_requests=self.max_queued_requests,
            max_queued_tokens=self.max_queued_tokens,
            max_queue_wait_s=None if self.max_queue_wait_s == "auto" else self.max_queue_wait_s,
            max_requests_per_client=self.max_requests_per_client,
            max_response_bytes=self.max_response_bytes,
        )

    def routing(self) -> RoutingPolicy:
        """How sequences are spread over several executors."""
        return RoutingPolicy(max_imbalance=self.max_executor_imbalance)

    def policy(self) -> SchedulerPolicy:
        """The part that the pure schedulers need."""
        return SchedulerPolicy(
            lookahead_tokens=self.lookahead_tokens,
            watermark_ratio=self.watermark_ratio,
            priority_aging_s=self.priority_aging_s,
            max_prefill_plans_in_flight=self.max_prefill_plans_in_flight,
            enable_prefix_caching=self.enable_prefix_caching,
        )
