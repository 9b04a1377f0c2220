"""Figures of a load run, from timings that are known."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.load.chart import column_chart, run_charts
from nanovllm.load.report import LoadReport
from nanovllm.load.slo import Slo
from nanovllm.load.summary import format_report
from nanovllm.load.timeline import timeline
from nanovllm.load.timing import Percentiles, RequestFailure, RequestTiming

FULL = RequestFailure("RESOURCE_EXHAUSTED", "the queue is full", is_refusal=True)
BROKEN = RequestFailure("INTERNAL", "it broke", is_refusal=False)


@st.composite
def timings(draw) -> RequestTiming:
    """A request whose tokens come one by one."""
    seconds = st.floats(0, 20)
    gaps = draw(st.lists(seconds, max_size=5))
    timing = RequestTiming(draw(seconds), failure=draw(st.sampled_from([None, FULL, BROKEN])))
    timing.e2e_s = draw(seconds)
    if draw(st.booleans()):
        timing.ttft_s = draw(seconds)
        timing.itl_s = gaps
        timing.num_first_tokens = 1
        timing.num_output_tokens = 1 + len(gaps)
        timing.e2e_s += timing.ttft_s + sum(gaps)
    return timing


def answered(started_s: float, ttft_s: float, itl_s: list[float], **fields) -> RequestTiming:
    e2e_s = ttft_s + sum(itl_s)
    counts = {"num_first_tokens": 1, "num_output_tokens": 1 + len(itl_s)}
    return RequestTiming(started_s, ttft_s, e2e_s, itl_s, **(counts | fields))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e4), min_size=1))
def test_percentiles_are_ordered_and_within_the_values(values):
    found = Percentiles.of(values)
    ordered = [min(values), found.p50, found.p90, found.p95, found.p99, max(values)]
    for lower, higher in pairwise(ordered):
        assert lower <= higher + 1e-9


def test_percentiles_are_interpolated():
    found = Percentiles.of([float(value) for value in range(101)])
    assert found == Percentiles(mean=50.0, p50=50.0, p90=90.0, p95=95.0, p99=99.0)


def test_throughput_is_over_the_whole_run():
    report = LoadReport.of(
        [
            RequestTiming(0.5, ttft_s=0.1, e2e_s=1.0, num_output_tokens=10, num_prompt_tokens=30),
            RequestTiming(
                1.0,
                ttft_s=0.3,
                e2e_s=1.5,
                num_output_tokens=30,
                num_prompt_tokens=10,
                num_cached_tokens=8,
            ),
        ]
    )
    assert report.duration_s == 2.0
    assert report.output_tokens_per_s == 20.0
    assert report.total_tokens_per_s == 40.0
    assert report.requests_per_s == 1.0
    assert report.prefix_hit_rate == 0.2
    assert report.ttft_s.p50 == pytest.approx(0.2)
    assert report.itl_s is None


def test_refusals_are_counted_apart_from_failures_and_have_no_latency():
    report = LoadReport.of(
        [
            answered(0.0, 1.0, [1.0]),
            RequestTiming(0.0, e2e_s=50.0, failure=FULL),
            RequestTiming(0.0, e2e_s=50.0, failure=FULL),
            RequestTiming(0.0, ttft_s=40.0, e2e_s=50.0, num_output_tokens=5, failure=BROKEN),
        ]
    )
    assert (report.num_requests, report.num_complete) == (4, 1)
    assert report.refusals == {"RESOURCE_EXHAUSTED": 2}
    assert report.failures == {"INTERNAL": 1}
    assert report.errors == ("it broke", "the queue is full")
    assert report.num_output_tokens == 7
    assert report.e2e_s.p99 == 2.0
    text = format_report(report)
    assert "4 (2 refused, 1 failed)" in text
    assert "2 RESOURCE_EXHAUSTED" in text
    assert "1 INTERNAL" in text


def test_report_of_nothing_is_empty():
    report = LoadReport.of([])
    assert (report.duration_s, report.output_tokens_per_s, report.e2e_s) == (0.0, 0.0, None)
    assert report.prefix_hit_rate is None
    assert "no sample" in format_report(report)


def test_time_per_output_token_leaves_out_the_first():
    assert answered(0.0, 5.0, [0.1, 0.3]).tpot_s == pytest.approx(0.2)
    assert answered(0.0, 5.0, []).tpot_s is None


class TestSlo:
    def test_limits_are_read_with_their_units(self):
        slo = Slo.parse("ttft=500ms, itl = 250us,e2e=1.5s")
        assert slo == Slo(ttft_s=0.5, itl_s=0.00025, e2e_s=1.5)

    @pytest.mark.parametrize(
        "text", ["", "ttft", "ttft=5", "ttft=5m", "ttft=-1s", "slow=1s", "ttft=1s,,e2e=1s"]
    )
    def test_what_is_no_limit_is_refused_with_an_example(self, text):
        with pytest.raises(ValueError, match="such as 500ms"):
            Slo.parse(text)

    def test_a_limit_given_twice_is_refused(self):
        with pytest.raises(ValueError, match="ttft is given twice"):
            Slo.parse("ttft=1s,ttft=2s")

    @pytest.mark.parametrize(
        ("slo", "is_met"),
        [
            (Slo(), True),
            (Slo(ttft_s=1.0, itl_s=0.3, tpot_s=0.2, e2e_s=1.4), True),
            (Slo(ttft_s=0.9), False),
            (Slo(itl_s=0.2), False),
            (Slo(tpot_s=0.19), False),
            (Slo(e2e_s=1.3), False),
        ],
    )
    def test_every_limit_counts(self, slo, is_met):
        assert slo.is_met_by(answered(0.0, 1.0, [0.1, 0.3])) is is_met

    def test_a_refused_request_meets_nothing(self):
        assert not Slo().is_met_by(RequestTiming(0.0, e2e_s=0.0, failure=FULL))

    def test_goodput_is_of_all_requests_sent(self):
        run = [answered(0.0, 1.0, [1.0]), answered(0.0, 3.0, [1.0])]
        run.append(RequestTiming(0.0, e2e_s=0.0, failure=FULL))
        report = LoadReport.of(run, Slo.parse("ttft=2s"))
        assert report.goodput.num_good == 1
        assert report.goodput.share == pytest.approx(1 / 3)
        assert report.goodput.requests_per_s == 0.25
        assert "(1 of 3) within TTFT 2000 ms" in format_report(report)

    @settings(max_examples=50, deadline=None)
    @given(st.lists(timings(), min_size=1, max_size=8), st.floats(0.01, 20))
    def test_a_stricter_objective_is_never_met_more_often(self, run, limit_s):
        strict = LoadReport.of(run, Slo(ttft_s=limit_s / 2, e2e_s=limit_s)).goodput
        loose = LoadReport.of(run, Slo(ttft_s=limit_s)).goodput
        assert strict.num_good <= loose.num_good <= LoadReport.of(run).num_complete


class TestTimeline:
    @settings(max_examples=50, deadline=None)
    @given(st.lists(timings(), min_size=1, max_size=8), st.floats(0.1, 5))
    def test_intervals_hold_every_request_and_every_token(self, run, interval_s):
        points = timeline(run, interval_s)
        assert sum(point.num_arrivals for point in points) == len(run)
        assert sum(point.num_ends for point in points) == len(run)
        assert points[-1].num_outstanding == 0
        tokens = sum(point.output_tokens_per_s for point in points) * interval_s
        assert tokens == pytest.approx(sum(timing.num_output_tokens for timing in run))

    def test_figures_are_those_of_their_second(self):
        first, second = timeline(
            [answered(5.0, 0.5, [0.1, 1.0]), answered(5.25, 0.75, [])], interval_s=1.0
        )
        assert (first.num_arrivals, first.num_ends, first.num_outstanding) == (2, 0, 2)
        assert first.output_tokens_per_s == 2.0
        assert first.ttft_p50_s == pytest.approx(0.625)
        assert (second.start_s, second.num_ends, second.num_outstanding) == (1.0, 2, 0)
        assert second.output_tokens_per_s == 2.0
        assert second.ttft_p50_s is None

    def test_deltas_of_unknown_size_share_the_tokens(self):
        timing = answered(0.0, 0.5, [1.0], num_output_tokens=10)
        assert [point.output_tokens_per_s for point in timeline([timing], 1.0)] == [5.0, 5.0]

    def test_no_run_has_no_intervals_and_no_charts(self):
        assert timeline([], 1.0) == []
        assert run_charts([]) == ""

    def test_an_interval_of_nothing_is_refused(self):
        with pytest.raises(ValueError, match="longer than 0"):
            timeline([], 0.0)


class TestChart:
    def test_columns_grow_with_their_values(self):
        lines = column_chart("title", [0.0, 2.0, None, 4.0, 0.001], height=2).splitlines()
        assert lines == ["title", f"{'4':>10} │   █", f"{'0':>10} │ █ █▁"]

    def test_charts_of_a_run_are_as_wide_as_asked(self):
        text = run_charts([answered(0.0, 0.5, [0.1, 1.0])], width=20)
        assert "output tok/s" in text
        assert "TTFT p50 (ms)" in text
        assert text.count("─" * 20 + " 1.6 s") == 2
