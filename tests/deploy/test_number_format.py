"""Numbers in the dashboards' pictures."""

import math

import pytest

from deploy.grafana.number_format import format_number


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0.0, "s", "0 s"),
        (1.5, "s", "1.5 s"),
        (250.4, "s", "250 s"),
        (0.0421, "s", "42.1 ms"),
        (0.0002, "s", "200 µs"),
        (0.4567, "percentunit", "45.7 %"),
        (1.0, "percentunit", "100 %"),
        (3.0, "short", "3"),
        (0.0, "short", "0"),
        (0.0, "bytes", "0 B"),
        (0.05, "suffix:/s", "0.05/s"),
        (2e-7, "s", "0.2 µs"),
        (1234.0, "short", "1.23k"),
        (0.25, "reqps", "0.25 req/s"),
        (117.4, "suffix: tok/s", "117 tok/s"),
        (2.5e6, "suffix: tok", "2.5M tok"),
        (3 * 2.0**30, "bytes", "3 GiB"),
        (math.nan, "s", "no data"),
    ],
)
def test_number_has_three_digits_and_its_unit(value: float, unit: str, expected: str) -> None:
    assert format_number(value, unit) == expected
