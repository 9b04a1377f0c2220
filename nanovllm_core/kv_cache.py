"""The paged KV cache: a pool of blocks that sequences own piecewise."""

import math

import numpy as np
import torch
from torch import Tensor

from nanovllm_core.config import ModelConfig

# Vector loads of 64 bytes then never straddle cache lines.
_ALIGNMENT_BYTES = 64


class KVCache:
    """Keys and values of all layers in blocks of `block_size` tokens.

    `key` and `value` are [num_layers, num_blocks + 1, block_size, num_kv_heads, head_dim]. Who owns
    which block is the scheduler's business. The last block is a trash block: padded rows write to
    it, and what it holds is never given weight.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocates the pool.

        Raises:
            ValueError: num_blocks or block_size is not positive.
        """
        if num_blocks <= 0 or block_size <= 0:
            raise ValueError(
                f"num_blocks ({num_blocks}) and block_size ({block_size}) must be positive"
            )
        shape = (
            config.num_layers,
            num_blocks + 1,
            block_size,
            config.num_kv_heads,
            config.head_dim,
        )
        # Zeros, because attention may multiply masked values of unwritten blocks by zero, and
        # uninitialised memory can hold NaN.
        self.key = _zeros(shape, dtype, device)
        self.value = _zeros(shape, dtype, device)
        self.num_blocks = num_blocks
        self.block_size = block_size
        # The same memory by flat slot, one [slots, num_kv_heads, head_dim] view per layer.
        self._key_slots = [layer.flatten(0, 1) for layer in self.key]
        self._value_slots = [layer.flatten(0, 1) for layer in self.value]

    @property
    def trash_slot(self) -> int:
        """Flat slot that padded rows write to."""
        return self.num_blocks * self.block_size

    def write(self, layer: int, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Stores the KV of one iteration.

        Args:
            layer: index of the layer.
            key: [num_tokens, num_kv_heads, head_dim] in the cache's dtype.
            value: like `key`.
            slot_mapping: [num_tokens] int64 flat slots. A slot may occur twice only with the same
                contents, or as the trash slot.
        """
        self._key_slots[layer].index_copy_(0, slot_mapping, key)
        self._value_slots[layer].index_copy_(0, slot_mapping, value)

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block takes over all layers, keys and values."""
        elements = config.num_layers * block_size * config.num_kv_heads * config.head_dim
        return 2 * elements * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that cost a CPU nothing before they are used.

    torch.zeros writes every page (10 s for 4 GiB where a page fault takes 10 us); numpy's zeros are
    the operating system's own, given page by page, in huge pages where there are some.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    pool = np.zeros(num_bytes + _ALIGNMENT_BYTES, dtype=np.uint8)
    start = -pool.ctypes.data % _ALIGNMENT_BYTES
    return torch.from_numpy(pool[start : start + num_bytes]).view(dtype).view(shape)
