"""Summary of a load run."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nanovllm.load.slo import Goodput, Slo
from nanovllm.load.timing import Percentiles, RequestFailure, RequestTiming


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Summary of a run."""

    #: From when the first request was due to the last one's end.
    duration_s: float
    num_requests: int
    #: Requests that the server turned down, and those that it, or the connection, failed at.
    num_refused: int
    num_failed: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    #: Deltas with tokens. Output tokens over these is how coarse the streams were.
    num_deltas: int
    #: Over the whole duration: requests with their whole answer, output tokens, and output and
    #: prompt tokens together.
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    #: Cached over all prompt tokens; None without prompt tokens.
    prefix_hit_rate: float | None
    #: Distributions over requests, but over tokens for `itl_s`; None without a sample.
    ttft_s: Percentiles | None
    itl_s: Percentiles | None
    tpot_s: Percentiles | None
    e2e_s: Percentiles | None
    #: How much later than due requests were sent; part of the latencies above.
    send_delay_s: Percentiles | None
    #: None without an objective.
    goodput: Goodput | None
    #: Number of refused and of failed requests by status.
    refusals: dict[str, int]
    failures: dict[str, int]
    #: Messages of refused and failed requests, each once.
    errors: tuple[str, ...]

    @classmethod
    def of(cls, timings: Sequence[RequestTiming], slo: Slo | None = None) -> "LoadReport":
        """Summarises the timings; failed requests count for tokens, not for latencies."""
        good = [timing for timing in timings if timing.failure is None]
        ends = [timing.failure for timing in timings if timing.failure is not None]
        start_s = min((timing.started_s for timing in timings), default=0.0)
        duration_s = max((timing.end_s for timing in timings), default=0.0) - start_s
        prompt_tokens = sum(timing.num_prompt_tokens for timing in timings)
        cached_tokens = sum(timing.num_cached_tokens for timing in timings)
        output_tokens = sum(timing.num_output_tokens for timing in timings)

        def per_second(amount: int) -> float:
            return amount / duration_s if duration_s > 0 else 0.0

        refusals = _by_code(failure for failure in ends if failure.is_refusal)
        failures = _by_code(failure for failure in ends if not failure.is_refusal)
        return cls(
            duration_s=duration_s,
            num_requests=len(timings),
            num_refused=sum(refusals.values()),
            num_failed=sum(failures.values()),
            num_prompt_tokens=prompt_tokens,
            num_cached_tokens=cached_tokens,
            num_output_tokens=output_tokens,
            num_deltas=sum(timing.num_deltas for timing in timings),
            requests_per_s=per_second(len(good)),
            output_tokens_per_s=per_second(output_tokens),
            total_tokens_per_s=per_second(prompt_tokens + output_tokens),
            prefix_hit_rate=cached_tokens / prompt_tokens if prompt_tokens else None,
            ttft_s=Percentiles.of([t.ttft_s for t in good if t.ttft_s is not None]),
            itl_s=Percentiles.of([gap for t in good for gap in t.itl_s]),
            tpot_s=Percentiles.of([tpot for t in good if (tpot := t.tpot_s) is not None]),
            e2e_s=Percentiles.of([t.e2e_s for t in good]),
            send_delay_s=Percentiles.of([t.send_delay_s for t in timings]),
            goodput=None if slo is None else Goodput.of(timings, slo, duration_s),
            refusals=refusals,
            failures=failures,
            errors=tuple(sorted({failure.message for failure in ends})),
        )

    @property
    def num_complete(self) -> int:
        """Requests that got their whole answer."""
        return self.num_requests - self.num_refused - self.num_failed

    def as_dict(self) -> dict[str, Any]:
        """Returns the report for JSON."""
        return asdict(self)


def _by_code(failures: Iterable[RequestFailure]) -> dict[str, int]:
    return dict(sorted(Counter(failure.code for failure in failures).items()))
