"""The report of a load run as text."""

from nanovllm.load.report import LoadReport
from nanovllm.load.slo import Goodput
from nanovllm.load.timing import Percentiles

_COLUMNS = ("mean", "p50", "p90", "p95", "p99")


def format_report(report: LoadReport) -> str:
    """Returns the report as text, latencies in milliseconds."""
    hit_rate = report.prefix_hit_rate
    cached = "none counted" if hit_rate is None else f"{hit_rate:.1%} cached"
    lines = [
        f"requests        {report.num_requests} ({report.num_refused} refused, "
        f"{report.num_failed} failed) in {report.duration_s:.2f} s",
        *_counts("refused", report.refusals),
        *_counts("failed", report.failures),
        f"prompt tokens   {report.num_prompt_tokens} ({cached})",
        f"output tokens   {report.num_output_tokens}",
        f"throughput      {report.output_tokens_per_s:.1f} output tok/s, "
        f"{report.total_tokens_per_s:.1f} total tok/s, {report.requests_per_s:.2f} requests/s",
    ]
    if report.goodput is not None:
        lines.append(_goodput(report.goodput, report.num_requests))
    lines += [
        f"{'latency (ms)':<15}" + "".join(f"{name:>10}" for name in _COLUMNS),
        _latency("TTFT", report.ttft_s),
        _latency("ITL", report.itl_s),
        _latency("TPOT", report.tpot_s),
        _latency("E2E", report.e2e_s),
        _latency("sent late by", report.send_delay_s),
    ]
    return "\n".join(lines)


def _counts(what: str, by_code: dict[str, int]) -> list[str]:
    return [f"  {what:<13} {count} {code}" for code, count in by_code.items()]


def _goodput(goodput: Goodput, num_requests: int) -> str:
    slo = goodput.slo
    limits = {"TTFT": slo.ttft_s, "ITL": slo.itl_s, "TPOT": slo.tpot_s, "E2E": slo.e2e_s}
    text = ", ".join(f"{name} {limit * 1e3:g} ms" for name, limit in limits.items() if limit)
    return (
        f"goodput         {goodput.requests_per_s:.2f} requests/s, {goodput.share:.1%} "
        f"({goodput.num_good} of {num_requests}) within {text}"
    )


def _latency(name: str, latency_s: Percentiles | None) -> str:
    if latency_s is None:
        return f"  {name:<13}{'no sample':>10}"
    values = (getattr(latency_s, column) for column in _COLUMNS)
    return f"  {name:<13}" + "".join(f"{value * 1e3:>10.2f}" for value in values)
