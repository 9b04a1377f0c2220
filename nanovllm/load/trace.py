"""Traces: CSV files that say when requests come and how long they are."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

_REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens")
_OPTIONAL = ("prefix_group", "prefix_tokens")
_HEADERS = tuple((*_REQUIRED, *_OPTIONAL[:count]) for count in range(len(_OPTIONAL) + 1))


class TraceError(ValueError):
    """A trace cannot be used; the message names the file, the line and what is wrong there."""


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace."""

    #: Seconds since the start of the trace.
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    #: Requests of the same group begin with the same tokens; empty for a request of its own.
    prefix_group: str = ""
    #: How many tokens they share; None where it is as many as their lengths allow.
    prefix_tokens: int | None = None

    @property
    def num_shared_tokens(self) -> int:
        """Tokens at the start of the prompt that come from the group."""
        if not self.prefix_group:
            return 0
        return self.prompt_tokens if self.prefix_tokens is None else self.prefix_tokens


def read_trace(path: Path) -> list[TraceRow]:
    """Reads a CSV file with the header arrival_s,prompt_tokens,output_tokens, behind which
    prefix_group, or prefix_group and prefix_tokens, may stand.

    Raises:
        TraceError: A line is wrong, or there is none.
        OSError: The file cannot be read.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            return parse_trace(file, str(path))
        except UnicodeDecodeError as error:
            raise TraceError(f"{path}: not UTF-8 text: {error}") from error


def parse_trace(lines: Iterable[str], name: str) -> list[TraceRow]:
    """Reads the lines of a trace; `name` stands in messages. See `read_trace`."""
    reader = csv.reader(lines, strict=True)
    rows: list[TraceRow] = []
    try:
        header = tuple(cell.strip() for cell in next(reader, []))
        if header not in _HEADERS:
            raise TraceError(
                f"{name}, line 1: the header is {','.join(header)!r}; it has to be "
                f"{','.join(_REQUIRED)}, then optionally {' and '.join(_OPTIONAL)}"
            )
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} values for {len(header)} columns")
            row = _row(dict(zip(header, (cell.strip() for cell in cells), strict=True)))
            if rows and row.arrival_s < rows[-1].arrival_s:
                raise ValueError(
                    f"arrival_s {row.arrival_s:g} is before that of the row above, "
                    f"{rows[-1].arrival_s:g}; sort the rows by arrival_s"
                )
            rows.append(row)
    except (TraceError, UnicodeDecodeError):
        raise
    except (ValueError, csv.Error) as error:
        raise TraceError(f"{name}, line {reader.line_num}: {error}") from error
    if not rows:
        raise TraceError(f"{name}: there is no row below the header")
    return rows


def scale_trace(rows: Sequence[TraceRow], factor: float) -> list[TraceRow]:
    """Returns the same requests at `factor` times the rate, the first of them at 0.

    Raises:
        ValueError: `factor` is not a finite number above 0.
    """
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"the scale of a trace must be above 0, got {factor:g}")
    return [replace(row, arrival_s=(row.arrival_s - rows[0].arrival_s) / factor) for row in rows]


def _row(cells: dict[str, str]) -> TraceRow:
    arrival_s = _seconds(cells["arrival_s"])
    prompt_tokens = _count(cells, "prompt_tokens", at_least=1)
    output_tokens = _count(cells, "output_tokens", at_least=1)
    group = cells.get("prefix_group", "")
    prefix_tokens = None
    if cells.get("prefix_tokens"):
        if not group:
            raise ValueError("prefix_tokens needs a prefix_group; name one or leave both empty")
        prefix_tokens = _count(cells, "prefix_tokens", at_least=0)
        if prefix_tokens > prompt_tokens:
            raise ValueError(
                f"prefix_tokens {prefix_tokens} exceeds prompt_tokens {prompt_tokens}, "
                "which includes it"
            )
    return TraceRow(arrival_s, prompt_tokens, output_tokens, group, prefix_tokens)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"arrival_s must be a number of seconds of at least 0, got {text!r}")
    return value


def _count(cells: dict[str, str], name: str, at_least: int) -> int:
    text = cells[name]
    if not (text.isascii() and text.isdigit()) or int(text) < at_least:
        raise ValueError(f"{name} must be a whole number of at least {at_least}, got {text!r}")
    return int(text)
