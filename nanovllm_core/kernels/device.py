"""Device functions shared by several kernels."""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def supports_dependent_launch(device: torch.device) -> bool:
    """Whether kernels may start while the one before them finishes (compute capability 9.0)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


# A programmatic dependent launch lets a kernel start before the one in front of it has ended. Every
# kernel of a chain calls `wait_for_previous` in every block that does anything, which keeps the
# chain ordered: a kernel that has ended has seen its predecessor end. Before that call a block
# writes nothing, and reads nothing that the kernel in front may write.
#
# When the next kernel may start is each kernel's choice:
# - at once (`launch_next` first): the next kernel's weights are on their way early. It may start
#   before kernels further in front have ended, so before its wait it may not read what they write.
# - after its own wait (`start_dependents`): everything but this kernel's own output is there when
#   the next kernel starts, or any kernel behind that.
#
# One kernel of every layer does the latter: gate-up or attention (`launch.gate_up_holds_back`). So
# attention may read the iteration's lengths and block tables before its wait: they were written in
# front of that kernel of the layer before. In the first layer they are there because its QKV
# projection starts the chain: it is launched after what writes them has ended.


@triton.jit
def launch_next(DEPENDENT: tl.constexpr):
    """Lets the next kernel start once all blocks have come here; nothing without a chain."""
    if DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(DEPENDENT: tl.constexpr):
    """Waits until the kernel in front has ended and its writes are visible."""
    if DEPENDENT:
        gdc_wait()


@triton.jit
def start_dependents(DEPENDENT: tl.constexpr):
    """Waits for the kernel in front, then lets the next one start."""
    wait_for_previous(DEPENDENT)
    launch_next(DEPENDENT)


@triton.jit
def fence_weight_loads(DEPENDENT: tl.constexpr):
    """Separates a block's weight loads from everything that depends on the kernel in front.

    Without a fence the compiler interleaves loads and arithmetic to save registers and keeps 3
    loads of a thread in flight instead of 8 (seen in the machine code for sm_90).
    """
    if DEPENDENT:
        wait_for_previous(True)
    else:
        tl.debug_barrier()


@triton.jit
def silu(x):
    """x * sigmoid(x) in float32; exp overflows to infinity for very negative x, giving -0."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def arrived_last(counter_ptr, num_blocks):
    """True in the last of num_blocks thread blocks to get here; the counter returns to zero.

    The others' stores made before their call are visible to that block, if it reads past the L1
    cache (cache_modifier=".cg"): the barrier orders all threads' stores before one thread's
    release, and its acquire before the reads (PTX memory model, causality order).
    """
    tl.debug_barrier()
    ticket = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    last = ticket == num_blocks - 1
    if last:
        tl.store(counter_ptr, 0)
    return last
