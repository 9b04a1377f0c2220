"""Settings of the scheduler process: command line, then NANOVLLM_SCHEDULER_*, then defaults."""

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from nanovllm.service_settings import ServiceSettings
from scheduler_service.scheduler import SchedulerPolicy


class SchedulerSettings(ServiceSettings):
    """A gRPC scheduler that serves the public API and steers one executor."""

    model_config = SettingsConfigDict(
        env_prefix="NANOVLLM_SCHEDULER_", cli_prog_name="scheduler_service"
    )

    executor: str = Field("127.0.0.1:50052", description="Address of the executor.")
    listen: str = Field("127.0.0.1:50051", description="Address to serve on; port 0 picks one.")
    metrics_port: int = Field(
        9401, ge=-1, le=65535, description="Port of /metrics; 0 picks one, -1 turns it off."
    )

    max_queued_requests: int = Field(
        4096, ge=1, description="Sequences that may wait; more are refused with RESOURCE_EXHAUSTED."
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

    executor_wait_timeout_s: float = Field(
        60.0, gt=0, description="How long requests wait for an executor before UNAVAILABLE."
    )
    executor_stall_timeout_s: float = Field(
        30.0, gt=0, description="Without a result for this long a busy executor counts as lost."
    )
    max_executor_losses: int = Field(
        3, ge=0, description="Executor losses that one request survives before it fails."
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, description="How long running requests may go on after SIGTERM."
    )

    def policy(self) -> SchedulerPolicy:
        """The part that the pure scheduler needs."""
        return SchedulerPolicy(
            lookahead_tokens=self.lookahead_tokens,
            watermark_ratio=self.watermark_ratio,
            priority_aging_s=self.priority_aging_s,
            max_prefill_plans_in_flight=self.max_prefill_plans_in_flight,
            enable_prefix_caching=self.enable_prefix_caching,
        )
