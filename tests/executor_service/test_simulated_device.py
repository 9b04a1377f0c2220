"""The benchmarks' simulated device behind the real services."""

import json
from pathlib import Path

import pytest

from benchmarks import in_process, throughput


@pytest.mark.parametrize("benchmark", [throughput, in_process])
def test_a_workload_runs_to_its_end_without_a_model(checkpoint, tmp_path: Path, benchmark) -> None:
    path = tmp_path / "result.json"
    # The tiny model of the tests is too short for whole prompts.
    arguments = ["--simulated-device", "--model", str(checkpoint), "--json", str(path)]
    arguments += ["--workload", "bench256", "--scale", "0.1", "--runs", "1", "--no-warm-up"]
    assert benchmark.main(arguments) == 0
    (result,) = json.loads(path.read_text())["results"]
    assert result["num_requests"] == 26
    assert result["output_tokens_per_s"] > 0
    assert 0 <= result["idle_share"] < 1
