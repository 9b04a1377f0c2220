"""Fused Triton kernels of the decode and prefill path.

One file per fused operation, each with its formula, the bytes it must move, the kernel, the
launcher and a torch reference in float64. `launch.py` holds every launch configuration.

All launchers allocate only their outputs, never synchronise with the host and derive the grid from
host-known shapes, so that each can be captured in a CUDA graph. Importing a module of this package
imports triton; nothing here is imported on a machine without it.
"""
