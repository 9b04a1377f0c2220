"""docs/metrics.md is what the code defines."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    path = ROOT / "docs" / "generate_metrics.py"
    spec = importlib.util.spec_from_file_location("generate_metrics", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_document_is_up_to_date(generator: ModuleType):
    written = generator.DOCUMENT.read_text(encoding="utf-8")
    assert written == generator.document(), "run `make docs`"


def test_units_follow_from_names(generator: ModuleType):
    assert generator.unit(CounterMetricFamily("nanovllm_gpu_busy_seconds", "Test.")) == "seconds"
    assert generator.unit(GaugeMetricFamily("nanovllm_kv_cache_usage_ratio", "Test.")) == "0 to 1"
    assert generator.unit(GaugeMetricFamily("nanovllm_slots_active", "Test.")) == ""
