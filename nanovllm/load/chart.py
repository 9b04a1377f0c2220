"""Column charts of text for a terminal."""

from collections.abc import Sequence

from nanovllm.load.timeline import timeline
from nanovllm.load.timing import RequestTiming

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_LABEL_WIDTH = 10


def column_chart(title: str, values: Sequence[float | None], *, height: int = 5) -> str:
    """Draws values of at least 0 as columns, one character wide; None leaves a gap.

    Args:
        title: The line above.
        values: From left to right.
        height: Lines of the chart; each has eight steps.
    """
    top = max((value for value in values if value is not None), default=0.0)
    steps = [_steps(value, top, height) for value in values]
    lines = [title]
    for row in reversed(range(height)):
        label = f"{top:.4g}" if row == height - 1 else "0" if row == 0 else ""
        columns = "".join(_EIGHTHS[min(8, max(0, step - 8 * row))] for step in steps)
        lines.append(f"{label:>{_LABEL_WIDTH}} │{columns}".rstrip())
    return "\n".join(lines)


def run_charts(timings: Sequence[RequestTiming], *, width: int = 60) -> str:
    """Draws output tokens per second and the median TTFT over the time of a run."""
    start_s = min((timing.started_s for timing in timings), default=0.0)
    duration_s = max((timing.end_s for timing in timings), default=0.0) - start_s
    if duration_s <= 0:
        return ""
    points = timeline(timings, duration_s / width)
    ttft_ms = [None if p.ttft_p50_s is None else p.ttft_p50_s * 1e3 for p in points]
    axis = f"{'':>{_LABEL_WIDTH}} └{'─' * width} {duration_s:.4g} s"
    return "\n".join(
        [
            column_chart("output tok/s over time", [p.output_tokens_per_s for p in points]),
            axis,
            column_chart("TTFT p50 (ms) by time of arrival", ttft_ms),
            axis,
        ]
    )


def _steps(value: float | None, top: float, height: int) -> int:
    if value is None or value <= 0:
        return 0
    # What is above 0 shows.
    return max(1, round(value / top * 8 * height))
