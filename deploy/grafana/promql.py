"""PromQL expressions that the panels share. All of them heed the dashboard's variables."""

_MODEL = 'model_name=~"$model_name"'
# Grafana makes this at least four scrapes, so that a rate always has samples.
_WINDOW = "[$__rate_interval]"


def select(metric: str, *matchers: str, window: bool = False) -> str:
    """The series of a metric for the chosen models, and their recent samples if `window`."""
    return f"{metric}{{{', '.join([_MODEL, *matchers])}}}{_WINDOW if window else ''}"


def total(metric: str, *matchers: str, by: str = "") -> str:
    """A gauge, summed over processes."""
    return f"{_sum(by)} ({select(metric, *matchers)})"


def per_second(counter: str, *matchers: str, by: str = "") -> str:
    """Growth of a counter per second, summed over processes."""
    return f"{_sum(by)} (rate({select(counter, *matchers, window=True)}))"


def ratio(part: str, whole: str) -> str:
    """Growth of one counter relative to that of another."""
    return f"{per_second(part)} / {per_second(whole)}"


def mean(histogram: str) -> str:
    """Mean of a histogram's recent observations."""
    return ratio(f"{histogram}_sum", f"{histogram}_count")


def quantile(share_below: float, histogram: str, *matchers: str, by: str = "") -> str:
    """The value that `share_below` of a histogram's recent observations stay below."""
    labels = ", ".join(filter(None, ["le", by]))
    buckets = per_second(f"{histogram}_bucket", *matchers, by=labels)
    return f"histogram_quantile({share_below:g}, {buckets})"


def bucket_growth(histogram: str) -> str:
    """Recent observations of each bucket, for a heatmap."""
    return f"sum by (le) (increase({select(f'{histogram}_bucket', window=True)}))"


def device_share(counter: str) -> str:
    """Seconds of device time per second, as the mean over executors."""
    return f"avg (rate({select(counter, window=True)}))"


def _sum(by: str) -> str:
    return f"sum by ({by})" if by else "sum"
