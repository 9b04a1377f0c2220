"""Renders conversations in processes that a bad template can only hurt itself in."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Processor time of one rendering, in seconds. Real templates take milliseconds.
MAX_CPU_S = 1.0

_WORKER = Path(__file__).with_name("template_worker.py")
# All of the environment that a worker gets: what finds Python and its packages, and what dates in
# templates depend on. The rest may hold keys of other services, in reach of whatever leaves the
# sandbox.
_ENVIRONMENT = (
    *("PATH", "HOME", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH"),
    *("LANG", "LC_ALL", "LC_TIME", "TZ"),
)


class TemplateError(Exception):
    """The template did not render the conversation; the message ends the sentence "it ..."."""


class ChatRenderer:
    """Keeps worker processes and gives each rendering one of its own. Thread-safe.

    There are as many processes as renderings at the same time.
    """

    def __init__(self, max_cpu_s: float = MAX_CPU_S) -> None:
        """Starts nothing yet; `max_cpu_s` is the processor time of one rendering."""
        self._max_cpu_s = max_cpu_s
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._is_closed = False

    def warm_up(self) -> None:
        """Starts a process, which takes a second, without waiting for it."""
        self._give_back(_Worker(self._max_cpu_s))

    def render(
        self,
        template: str,
        messages: list[dict[str, str]],
        variables: Mapping[str, Any],
        *,
        add_generation_prompt: bool,
    ) -> str:
        """Returns the text. Raises TemplateError."""
        worker = self._take()
        try:
            answer = worker.ask(
                {
                    "template": template,
                    "messages": messages,
                    "add_generation_prompt": add_generation_prompt,
                    "variables": dict(variables),
                }
            )
        except BaseException:
            worker.close()
            raise
        self._give_back(worker)
        if "text" not in answer:
            raise TemplateError(answer["error"])
        return answer["text"]

    def close(self) -> None:
        """Ends the processes; those that render end afterwards."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.close()

    def _take(self) -> "_Worker":
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return _Worker(self._max_cpu_s)

    def _give_back(self, worker: "_Worker") -> None:
        with self._lock:
            if not self._is_closed:
                self._idle.append(worker)
                return
        worker.close()


class _Worker:
    """One process; used by one thread at a time."""

    def __init__(self, max_cpu_s: float) -> None:
        self._process = subprocess.Popen(
            # Without the script's folder on the search path: its neighbours have common names.
            [sys.executable, "-P", str(_WORKER), str(max_cpu_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            encoding="utf-8",
        )

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        """Returns the answer. Raises TemplateError if the process dies of it."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the template process has no pipes")
        try:
            # ASCII: half of a surrogate pair, which JSON allows, has no UTF-8.
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise TemplateError("cannot render it: it needs too much time or memory")
        answer: dict[str, str] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    return kept | {"PYTHONDONTWRITEBYTECODE": "1"}
