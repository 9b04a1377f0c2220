"""The numbers that stand in the first row of both dashboards."""

from deploy.grafana import promql
from deploy.grafana.panels import Limits, Panel, value
from deploy.grafana.units import REQUESTS, SHARE

BUSY = "nanovllm_gpu_busy_seconds_total"
IDLE = "nanovllm_gpu_idle_seconds_total"


def waiting() -> Panel:
    """Whether anyone waits."""
    return value(
        "Waiting",
        "Sequences in the queue. Bad when it stays above zero: requests arrive faster than they "
        "are served, or no executor is connected.",
        promql.total("nanovllm_num_requests_waiting"),
        REQUESTS,
        Limits(1, 64),
    )


def gpu_busy() -> Panel:
    """What the device does."""
    return value(
        "GPU busy",
        "Share of the time that the device computes, as the mean over executors; without a GPU "
        "the device is the CPU. High is good. Low is bad only while sequences wait.",
        promql.device_share(BUSY),
        SHARE,
    )


def gpu_idle() -> Panel:
    """What the device could have done."""
    return value(
        "GPU idle with work",
        "Share of the time that the device idles although a slot could run: the price of two "
        "processes. Bad when it is not close to zero.",
        promql.device_share(IDLE),
        SHARE,
        Limits(0.05, 0.2),
    )
