"""The command `nanovllm`.

Exit status: 0 on success, 1 with one line on stderr if something failed, 2 on wrong usage, 130 on
Ctrl-C.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from nanovllm import __version__
from nanovllm.cli import admin, bench, chat, demo, generate, health, info, models
from nanovllm.cli.options import CommandError
from nanovllm.errors import NanovllmError
from nanovllm.model_store import ModelNotFoundError
from nanovllm.services import ServiceStartError

INTERRUPTED = 130
#: What an expected failure raises; anything else is a fault of this program.
EXPECTED_ERRORS = (CommandError, ModelNotFoundError, NanovllmError, OSError, ServiceStartError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    Args:
        arguments: Command line arguments; default: those of this process.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    # The HTTP client under the hub's library reports every request.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except EXPECTED_ERRORS as error:
        print(f"nanovllm: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nanovllm", description="LLM inference over gRPC.")
    parser.add_argument("--version", action="version", version=f"nanovllm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (generate, chat, bench, info, health, models, demo, admin):
        module.add_command(commands)
    return parser
