"""Documents that are written from the code are up to date."""

from types import ModuleType

import pytest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

from docs import generate_metrics, generate_settings
from docs.tables import markdown_table


@pytest.mark.parametrize("generator", [generate_metrics, generate_settings])
def test_the_document_is_up_to_date(generator: ModuleType):
    written = generator.DOCUMENT.read_text(encoding="utf-8")
    assert written == generator.document(), "run `make docs`"


def test_a_table_has_a_line_for_each_row_and_keeps_empty_cells():
    table = markdown_table(("name", "meaning"), [("a", ""), ("", "b")])
    assert table == "| name | meaning |\n|---|---|\n| a | |\n| | b |"


def test_units_follow_from_names():
    unit = generate_metrics.unit
    assert unit(CounterMetricFamily("nanovllm_gpu_busy_seconds", "Test.")) == "seconds"
    assert unit(GaugeMetricFamily("nanovllm_kv_cache_usage_ratio", "Test.")) == "0 to 1"
    assert unit(GaugeMetricFamily("nanovllm_slots_active", "Test.")) == ""
