"""Renders chat templates in a process that may die: `python -P template_worker.py MAX_CPU_S`.

A template is a program of whoever made the checkpoint. Jinja's sandbox keeps it away from the
system, but bounds neither time nor memory, and no thread can stop a multiplication or a format()
that makes gigabytes. This process ends itself when a template goes too far; its owner starts
another one. Reads one JSON object a line, answers with one, and ends with its standard input. A
rendering may take MAX_CPU_S seconds of processor time.

Imports nothing of this project, so that it needs no search path.
"""

import json
import resource
import signal
import sys
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

#: What a rendering may need beyond what the process has when it starts.
MAX_EXTRA_BYTES = 512 * 1024 * 1024
#: Longest result; the longest prompts that models take have a few million characters.
MAX_RENDERED_CHARS = 16 * 1024 * 1024

_MAX_ERROR_CHARS = 300


def main() -> None:
    """Answers until the input ends."""
    max_cpu_s = float(sys.argv[1])
    # Ctrl-C is for the owner, which closes our input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit_resources()
    for line in sys.stdin:
        # Unlike a signal handler, the default action also ends a loop in C. Other processes' time
        # does not count.
        signal.setitimer(signal.ITIMER_PROF, max_cpu_s)
        answer = _answer(json.loads(line))
        text = json.dumps(answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def _limit_resources() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        num_bytes = int(file.read().split()[0]) * resource.getpagesize()
    limit = num_bytes + MAX_EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _answer(request: dict[str, Any]) -> dict[str, str]:
    try:
        # The annotation of the function is not what it returns.
        result: Any = render_jinja_template(
            conversations=[request["messages"]],
            chat_template=request["template"],
            add_generation_prompt=request["add_generation_prompt"],
            **request["variables"],
        )
    except jinja2.TemplateError as error:
        return {"error": f"refused it: {_one_line(error)}"}
    except MemoryError:
        return {"error": "cannot render it: it needs too much memory"}
    except Exception as error:  # a template is a program and may raise anything
        return {"error": f"cannot render it: {_one_line(error)}"}
    text: str = result[0][0]
    if len(text) > MAX_RENDERED_CHARS:
        return {"error": f"cannot render it: more than {MAX_RENDERED_CHARS} characters"}
    if any("\ud800" <= char <= "\udfff" for char in text):
        return {"error": "cannot render it: half of a surrogate pair is no text"}
    return {"text": text}


def _one_line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:_MAX_ERROR_CHARS]


if __name__ == "__main__":
    main()
