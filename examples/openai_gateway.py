"""Starts both services and the gateway smg, runs `openai_sdk.py` against them, stops everything.

python -m examples.openai_gateway --model smollm2-135m-instruct
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from examples.smg import SmgGateway
from nanovllm import LocalServices

EXAMPLE = Path(__file__).with_name("openai_sdk.py")


def main(arguments: list[str] | None = None) -> int:
    """Returns the example's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="what to serve")
    parser.add_argument("--device", default="auto", help="of the executor")
    parser.add_argument("--log-dir", type=Path, help="folder for the logs; default: stderr")
    options = parser.parse_args(arguments)
    services = LocalServices(
        options.model,
        executor_args=["--device", options.device],
        listen="tcp",
        log_dir=options.log_dir,
    )
    with services:
        log_path = None if options.log_dir is None else options.log_dir / "smg.log"
        with SmgGateway([services.address], log_path=log_path) as gateway:
            print(f"OPENAI_BASE_URL={gateway.base_url}", flush=True)
            environment = {**os.environ, "OPENAI_BASE_URL": gateway.base_url}
            return subprocess.run([sys.executable, str(EXAMPLE)], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
