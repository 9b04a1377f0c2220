"""Scratch memory of kernels whose blocks work together on one output.

Such a kernel stores partial results, and the block that arrives last adds them up in a fixed order,
so the result does not depend on which block that is. One workspace serves any number of kernels
that run one after another on a stream; a second stream needs its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm_core.kernels.checks import KernelInputError


@dataclass(frozen=True, slots=True)
class Workspace:
    """Partial results and arrival counters.

    `counters` is zero between kernels: the last block to arrive resets the one it used.
    """

    partials: Tensor  # [num_values] float32
    counters: Tensor  # [num_counters] int32

    @classmethod
    def allocate(cls, num_values: int, num_counters: int, device: torch.device) -> "Workspace":
        return cls(
            partials=torch.empty(num_values, dtype=torch.float32, device=device),
            counters=torch.zeros(num_counters, dtype=torch.int32, device=device),
        )

    def require(self, kernel: str, num_values: int, num_counters: int) -> None:
        """Refuse a workspace that is too small for a launch.

        Raises:
            KernelInputError: names the kernel and both sizes that it needs.
        """
        if self.partials.numel() < num_values or self.counters.numel() < num_counters:
            raise KernelInputError(
                f"{kernel} needs a workspace of {num_values} values and {num_counters} counters, "
                f"got {self.partials.numel()} and {self.counters.numel()}; allocate it for the "
                f"largest launch"
            )
