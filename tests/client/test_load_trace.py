"""Trace files: what they say, and what is said about wrong ones."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.load.trace import TraceError, TraceRow, parse_trace, read_trace, scale_trace

HEADER = "arrival_s,prompt_tokens,output_tokens"
FULL_HEADER = f"{HEADER},prefix_group,prefix_tokens"


def parse(*lines: str) -> list[TraceRow]:
    return parse_trace([f"{line}\n" for line in lines], "t.csv")


@st.composite
def rows(draw) -> list[TraceRow]:
    count = draw(st.integers(1, 8))
    arrivals = sorted(draw(st.lists(st.floats(0, 1e6), min_size=count, max_size=count)))

    def row(arrival_s: float) -> TraceRow:
        prompt_tokens = draw(st.integers(1, 10**6))
        group = draw(st.sampled_from(["", "a", "b c", 'quoted "x", y']))
        prefix = draw(st.none() | st.integers(0, prompt_tokens)) if group else None
        return TraceRow(arrival_s, prompt_tokens, draw(st.integers(1, 10**6)), group, prefix)

    return [row(arrival_s) for arrival_s in arrivals]


@settings(max_examples=50, deadline=None)
@given(rows())
def test_what_was_written_is_read(expected):
    def cells(row: TraceRow) -> str:
        group = '"' + row.prefix_group.replace('"', '""') + '"'
        prefix = "" if row.prefix_tokens is None else row.prefix_tokens
        return f"{row.arrival_s!r},{row.prompt_tokens},{row.output_tokens},{group},{prefix}"

    assert parse(FULL_HEADER, *map(cells, expected)) == expected


def test_groups_are_optional_and_blank_lines_are_nothing():
    assert parse(HEADER, "0,1,2", "", "0.5,3,4") == [TraceRow(0, 1, 2), TraceRow(0.5, 3, 4)]
    assert parse(f"{HEADER},prefix_group", "0,7,2,g")[0].num_shared_tokens == 7


def test_spreadsheets_files_are_read(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(f"\ufeff{HEADER}\r\n1, 2, 3\r\n".encode())
    assert read_trace(path) == [TraceRow(1.0, 2, 3)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "line 1: the header is ''"),
        (["arrival,prompt_tokens,output_tokens"], "line 1: the header is 'arrival,"),
        ([f"{HEADER},prefix_tokens"], "then optionally prefix_group and prefix_tokens"),
        ([HEADER], "no row below the header"),
        ([HEADER, "0,1,1", "0,1"], "line 3: 2 values for 3 columns"),
        ([HEADER, "0,1,1", "", "x,1,1"], "line 4: arrival_s must be a number .* got 'x'"),
        ([HEADER, "-1,1,1"], "line 2: arrival_s must be"),
        ([HEADER, "nan,1,1"], "line 2: arrival_s must be"),
        ([HEADER, "inf,1,1"], "line 2: arrival_s must be"),
        ([HEADER, "0,0,1"], "line 2: prompt_tokens must be a whole number of at least 1"),
        ([HEADER, "0,1,1.5"], "line 2: output_tokens must be .* got '1.5'"),
        ([HEADER, "0,1,²"], "line 2: output_tokens must be"),
        ([HEADER, "2,1,1", "1,1,1"], "line 3: arrival_s 1 is before .* 2; sort the rows"),
        ([FULL_HEADER, "0,5,1,,3"], "line 2: prefix_tokens needs a prefix_group"),
        ([FULL_HEADER, "0,5,1,g,6"], "line 2: prefix_tokens 6 exceeds prompt_tokens 5"),
        ([HEADER, '0,1,"1'], "line 2: "),
    ],
)
def test_a_wrong_line_is_named_with_what_is_wrong(lines, message):
    with pytest.raises(TraceError, match=message) as caught:
        parse(*lines)
    assert str(caught.value).startswith("t.csv")


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(HEADER.encode() + b"\n\xff,1,1\n")
    with pytest.raises(TraceError, match=r"t\.csv: not UTF-8"):
        read_trace(path)


def test_scaling_by_two_doubles_the_rate_and_begins_at_zero():
    scaled = scale_trace([TraceRow(10.0, 1, 1), TraceRow(14.0, 2, 2)], 2.0)
    assert scaled == [TraceRow(0.0, 1, 1), TraceRow(2.0, 2, 2)]


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_means_nothing_is_refused(factor):
    with pytest.raises(ValueError, match="must be above 0"):
        scale_trace([TraceRow(0.0, 1, 1)], factor)
