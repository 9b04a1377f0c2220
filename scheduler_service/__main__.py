"""Entry point: `python -m scheduler_service`."""

import asyncio
import sys

from nanovllm.logs import start_logging
from nanovllm.service_settings import StartupError
from scheduler_service.server import serve
from scheduler_service.settings import SchedulerSettings


def main() -> int:
    """Runs the service; returns the exit code."""
    try:
        settings = SchedulerSettings.from_arguments(sys.argv[1:])
        start_logging(settings.log_level, settings.log_format, in_background=True)
        asyncio.run(serve(settings))
    except StartupError as error:
        print(f"scheduler_service: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
