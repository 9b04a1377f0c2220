"""Faults of every kind while requests of every kind run: is anything lost, repeated or changed?

    python -m benchmarks.chaos
    python -m benchmarks.chaos --faults 200 --requests 1000 --seed 1 --json FILE
    python -m benchmarks.chaos --kind kill_scheduler --kind kill_executor --faults 10

Starts both services for a tiny random model in float32, behind proxies. Every result is compared
with an undisturbed run; afterwards nothing may be left running, waiting or owned. Ends with status
1 if a promise was broken.
"""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from benchmarks.chaos.faults import FAULTS
from benchmarks.chaos.run import VOCAB_SIZE, ChaosOptions, ReferenceError, run_chaos
from benchmarks.machine import describe_machine, machine_line
from benchmarks.report import write_json
from nanovllm.cli.options import positive_int
from nanovllm.service_process import ServiceStartError
from tests.checkpoints import make_checkpoint


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=positive_int, default=60, metavar="N")
    parser.add_argument("--requests", type=positive_int, default=300, metavar="N")
    parser.add_argument("--concurrency", type=positive_int, default=10, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kind", action="append", choices=sorted(FAULTS), help="default: all; repeatable"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    arguments = parser.parse_args()
    machine = describe_machine()
    print(machine_line(machine))
    options = ChaosOptions(
        num_faults=arguments.faults,
        num_requests=arguments.requests,
        concurrency=arguments.concurrency,
        seed=arguments.seed,
        kinds=arguments.kind or tuple(FAULTS),
    )
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        model = make_checkpoint(
            Path(folder) / "tiny", vocab_size=VOCAB_SIZE, max_position_embeddings=1024
        )
        try:
            report = asyncio.run(run_chaos(model, Path(folder), options, _show))
        except (ReferenceError, ServiceStartError) as error:
            print(f"chaos: {error}", file=sys.stderr)
            return 2
    print(report.text())
    if arguments.json is not None:
        write_json(arguments.json, {"machine": machine, "seed": arguments.seed, **report.as_dict()})
    return 0 if report.is_clean else 1


def _show(number: int, name: str) -> None:
    print(f"fault {number}: {name}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
