"""The interface of attention backends."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from nanovllm_core.batch import ForwardBatch
from nanovllm_core.config import ModelConfig
from nanovllm_core.kv_cache import KVCache


class AttentionBackend(ABC):
    """Causal attention of one iteration's tokens over the paged cache."""

    # What the user chooses it by.
    name: ClassVar[str]

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        """Prepares for one model on one device; the softmax scale is head_dim ** -0.5."""
        self.config = config
        self.device = device

    def prepare(self, batch: ForwardBatch, cache: KVCache) -> None:  # noqa: B027
        """Called once per iteration, before the first layer.

        The place for what all layers share, such as masks. It may be captured in a CUDA graph
        together with the layers, so for batches of decode rows it must not wait for the device.
        """

    @abstractmethod
    def attend(self, layer: int, query: Tensor, cache: KVCache, batch: ForwardBatch) -> Tensor:
        """Attends over each sequence's context.

        The KV of the whole batch has been written to `cache` before: sequences whose prefixes share
        blocks may be computed in one iteration.

        Args:
            layer: index of the layer.
            query: [num_tokens, num_heads, head_dim], after the rotary embedding.
            cache: the pool.
            batch: the one that `prepare` was last called with.

        Returns:
            [num_tokens, num_heads, head_dim]; finite but meaningless in rows that only pad.
        """
