"""A short run of the chaos benchmark; `make chaos` has the long one."""

import asyncio
from pathlib import Path

import pytest

from benchmarks.chaos.run import VOCAB_SIZE, ChaosOptions, run_chaos
from tests.checkpoints import make_checkpoint

# Each service is started again once; the rest is quick.
KINDS = (
    *("kill_executor", "hang_executor", "cut_executor_off", "reset_executor_link"),
    *("kill_scheduler", "reset_clients", "foreign_session", "storm_of_aborts"),
)


@pytest.mark.slow
def test_no_fault_loses_repeats_or_changes_a_token_or_leaks_a_block(tmp_path: Path):
    model = make_checkpoint(tmp_path / "tiny", vocab_size=VOCAB_SIZE, max_position_embeddings=1024)
    options = ChaosOptions(
        num_faults=len(KINDS), num_requests=30, num_cases=20, concurrency=6, seed=2, kinds=KINDS
    )
    report = asyncio.run(run_chaos(model, tmp_path, options))
    assert report.is_clean, report.text()
    assert sum(report.faults.values()) == len(KINDS)
    assert report.verdict.num_requests >= 30
    # Otherwise nothing was at stake.
    assert report.verdict.num_resumes > 0
    assert report.recoveries_s
    for log in ("executor.log", "scheduler.log"):
        assert "Traceback" not in (text := (tmp_path / log).read_text()), text
