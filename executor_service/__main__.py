"""Entry point: `python -m executor_service`."""

import sys

from executor_service.settings import ExecutorSettings
from nanovllm.logs import start_logging
from nanovllm.service_settings import StartupError


def main() -> int:
    """Runs the service; returns the exit code."""
    try:
        settings = ExecutorSettings.from_arguments(sys.argv[1:])
        start_logging(settings.log_level, settings.log_format)
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
