"""The part of Prometheus's HTTP API that reads."""

import json
import math
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_TIMEOUT_S = 30.0


class PrometheusError(RuntimeError):
    """Prometheus refused a query or cannot be reached; the message says why."""


@dataclass(frozen=True, slots=True)
class Series:
    """One result of a query."""

    labels: Mapping[str, str]
    # Unix times in seconds, and the values then.
    times_s: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def has_data(self) -> bool:
        """Whether there is a number; a ratio without any events is none."""
        return any(math.isfinite(value) for value in self.values)


class PrometheusApi:
    """Talks to one server."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        # Whoever asks for a server by its address means that one, not a proxy.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def query(self, expr: str) -> list[Series]:
        """The series of an expression now. Raises PrometheusError."""
        data = self._get("query", {"query": expr})
        if data["resultType"] == "scalar":
            time_s, value = data["result"]
            return [Series({}, (float(time_s),), (float(value),))]
        return [_series(item["metric"], [item["value"]]) for item in data["result"]]

    def query_range(self, expr: str, start_s: float, end_s: float, step_s: float) -> list[Series]:
        """The series of an expression over a time. Raises PrometheusError."""
        data = self._get(
            "query_range",
            {
                "query": expr,
                "start": f"{start_s:.3f}",
                "end": f"{end_s:.3f}",
                "step": f"{step_s:g}",
            },
        )
        return [_series(item["metric"], item["values"]) for item in data["result"]]

    def label_values(self, metric: str, label: str) -> list[str]:
        """The values of a metric's label. Raises PrometheusError."""
        values: list[str] = self._get(f"label/{label}/values", {"match[]": metric})
        return values

    def rules(self) -> list[dict[str, Any]]:
        """All rules with their state, as Prometheus describes them. Raises PrometheusError."""
        return [rule for group in self._get("rules", {})["groups"] for rule in group["rules"]]

    def _get(self, path: str, parameters: Mapping[str, str]) -> Any:
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with self._opener.open(url, timeout=_TIMEOUT_S) as response:
                body = response.read()
        except urllib.error.HTTPError as error:
            # Its body says what is wrong with the query.
            body = error.read()
        except OSError as error:
            raise PrometheusError(f"cannot reach {self._url}: {error}") from error
        try:
            document = json.loads(body)
        except ValueError as error:
            raise PrometheusError(f"{self._url} does not answer as Prometheus does") from error
        if document["status"] != "success":
            raise PrometheusError(f"{document['error']}: {parameters}")
        return document["data"]


def _series(labels: Mapping[str, str], samples: list[list[Any]]) -> Series:
    return Series(
        labels,
        tuple(float(time_s) for time_s, _ in samples),
        tuple(float(value) for _, value in samples),
    )
