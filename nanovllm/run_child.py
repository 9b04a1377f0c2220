"""Runs a service as a child that does not outlive its parent.

    python -m nanovllm.run_child MODULE [ARGUMENTS...]

The parent holds the other end of this process's standard input and never writes. When the parent
ends, however it ends, the kernel closes that end and the read here returns. Linux's parent death
signal would not do: it fires when the *thread* that started the child ends.
"""

import os
import runpy
import signal
import sys
import threading
import time

#: How long a service may drain after its parent died.
ORPHAN_GRACE_S = 10.0


def main() -> None:
    """Watches standard input and runs the module named in the arguments as `__main__`."""
    module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    lifeline = os.dup(0)
    # The service gets an empty standard input, so that nothing of it can take the end-of-file.
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)
    os.close(devnull)
    threading.Thread(target=_stop_with_parent, args=(lifeline,), daemon=True).start()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _stop_with_parent(lifeline: int) -> None:
    while os.read(lifeline, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
