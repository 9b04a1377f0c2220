"""What a service has when it is ready is left out of its garbage collections."""

import subprocess
import sys

import pytest

from tests.e2e.support import LIMIT_S

# Runs a service up to its ready line, and in place of that says how much is frozen and stops.
PROGRAM = """
import gc, os, signal, sys
import {service}.server as server
from {service}.__main__ import main

def announce_ready(address):
    print(gc.get_freeze_count(), sum(map(len, map(gc.get_objects, range(3)))), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

server.announce_ready = announce_ready
sys.exit(main())
"""


@pytest.mark.parametrize("service", ["scheduler_service", "executor_service"])
def test_a_service_that_is_ready_has_frozen_its_heap(service, checkpoint):
    result = subprocess.run(
        [
            *(sys.executable, "-c", PROGRAM.format(service=service)),
            *("--model", str(checkpoint("qwen3"))),
            *("--listen", "127.0.0.1:0", "--metrics-port", "-1"),
        ],
        capture_output=True,
        text=True,
        timeout=2 * LIMIT_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    num_frozen, num_others = map(int, result.stdout.split())
    # Modules alone are more than that; nothing but what came since is left to collect.
    assert num_frozen > 20_000
    assert num_others < 2_000
