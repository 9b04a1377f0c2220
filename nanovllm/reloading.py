"""Things made from files that change under a running process: certificates, keys, tokens."""

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from nanovllm.logs import fields

logger = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")


class Reloading(Generic[Loaded]):
    """Something made from files, made again when they change.

    Files that cannot be used are logged once, and what was made before stays in use. Thread-safe.
    """

    def __init__(self, files: tuple[Path, ...], load: Callable[[], Loaded]) -> None:
        """Loads for the first time; raises what `load` raises."""
        self._files = files
        self._load = load
        self._lock = threading.Lock()
        self._state = self._file_state()
        self._loaded = load()

    def get(self) -> Loaded:
        """Returns the newest that could be loaded."""
        with self._lock:
            self._refresh()
            return self._loaded

    def _refresh(self) -> None:
        # Before the files are read: a change meanwhile shows as another one at the next look.
        state = self._file_state()
        if state == self._state:
            return
        self._state = state
        try:
            self._loaded = self._load()
        except (ValueError, OSError) as error:
            logger.warning(
                "new files are broken; what was loaded before stays in use",
                extra=fields(problem=error),
            )
        else:
            logger.info("loaded again", extra=fields(files=",".join(map(str, self._files))))

    def _file_state(self) -> list[tuple[int, ...] | None]:
        return [_state_of(path) for path in self._files]


def _state_of(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
