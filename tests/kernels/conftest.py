"""Runs the kernel tests on the GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter computes bfloat16 arithmetic wrongly (float16 and float32 rightly), so bfloat16 is
tested on the GPU only.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    # Triton's own library functions are bound to the interpreter or the compiler on import, and
    # transformers, used by tests that were collected before, imports it. Only its native part must
    # not be loaded twice.
    for _name in list(sys.modules):
        if _name.split(".")[0] == "triton" and not _name.startswith("triton._C"):
            del sys.modules[_name]

pytest.importorskip("triton", reason="the kernels need triton")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, all kernel tests are GPU tests, not only those that need one."""
    if torch.cuda.is_available():
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker("gpu")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
