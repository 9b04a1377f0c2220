"""Numbers with units, about as Grafana writes them."""

import math

_SECONDS = ((1.0, " s"), (1e-3, " ms"), (1e-6, " µs"))
_METRIC = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_BINARY = ((2.0**30, " GiB"), (2.0**20, " MiB"), (2.0**10, " KiB"), (1.0, " B"))


def format_number(value: float, unit: str) -> str:
    """`value`, in base units, with three digits and the unit of a panel."""
    if not math.isfinite(value):
        return "no data"
    if unit == "percentunit":
        return f"{_three_digits(100 * value)} %"
    if unit == "s":
        return _scaled(value, _SECONDS)
    if unit == "bytes":
        return _scaled(value, _BINARY)
    suffix = {"reqps": " req/s"}.get(unit, unit.partition(":")[2])
    return _scaled(value, _METRIC) + suffix


def _scaled(value: float, scales: tuple[tuple[float, str], ...]) -> str:
    # The largest scale that fits, or the smallest there is; zero is written in the unit itself.
    fits = abs(value) or 1.0
    scale, name = next((item for item in scales if fits >= item[0]), scales[-1])
    return f"{_three_digits(value / scale)}{name}"


def _three_digits(value: float) -> str:
    # Not in exponential form, as %g would write 1234.
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
