"""Entry point: `python -m executor_service`."""

import sys

from executor_service.settings import ExecutorSettings
from nanovllm.service_settings import StartupError, start_logging


def main() -> int:
    """Runs the service; returns the exit code."""
    try:
        settings = ExecutorSettings.from_arguments(sys.argv[1:])
        start_logging(settings.log_level)
        # Brings torch, which takes seconds; --help and a bad setting need not wait for it.
        from executor_service.server import serve

        return serve(settings)
    except StartupError as error:
        print(f"executor_service: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
