"""Rotary position embedding: frequencies, tables and the rotation.

Dimension i of the first half of a head is rotated against dimension i of the second half ("NeoX"
order), as in Hugging Face checkpoints. Frequencies follow transformers' modeling_rope_utils.py step
by step in float32, so that float32 results agree to the last bits.
"""

import math

import torch
from torch import Tensor, nn

from nanovllm_core.config import ModelConfig
from nanovllm_core.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angular frequencies of the rotation.

    Returns:
        [head_dim / 2] float32 in radians per position, and the factor on cos and sin.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    wavelengths = config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0 / wavelengths, 1.0
    if isinstance(scaling, LinearScaling):
        return 1.0 / wavelengths / scaling.factor, 1.0
    if isinstance(scaling, Llama3Scaling):
        return _llama3_frequencies(1.0 / wavelengths, scaling), 1.0
    return _yarn_frequencies(wavelengths, config, scaling), scaling.attention_factor


def _llama3_frequencies(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    length = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    is_long = wavelengths > length / scaling.low_freq_factor
    is_short = wavelengths < length / scaling.high_freq_factor
    # Between the bounds: a weighted mean, linear in the number of turns within the length.
    weight = (length / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smoothed = (1 - weight) * frequencies / scaling.factor + weight * frequencies
    return torch.where(
        is_long, frequencies / scaling.factor, torch.where(is_short, frequencies, smoothed)
    )


def _yarn_frequencies(wavelengths: Tensor, config: ModelConfig, scaling: YarnScaling) -> Tensor:
    def dimension_of(num_rotations: float) -> float:
        turns = scaling.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return config.head_dim * math.log(turns) / (2 * math.log(config.rope_theta))

    low = dimension_of(scaling.beta_fast)
    high = dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(config.head_dim // 2, dtype=torch.float32) - low) / (high - low)
    extrapolated = 1 - ramp.clamp(0, 1)
    return (
        1.0 / (scaling.factor * wavelengths) * (1 - extrapolated)
        + (1.0 / wavelengths) * extrapolated
    )


class RotaryEmbedding(nn.Module):
    """Tables of cos and sin, [max_position_embeddings, head_dim / 2] float32 each."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__()
        frequencies, factor = inverse_frequencies(config)
        positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
        angles = torch.outer(positions, frequencies)
        self.register_buffer("cos", (angles.cos() * factor).to(device), persistent=False)
        self.register_buffer("sin", (angles.sin() * factor).to(device), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Looks up the rotation of every token; done once for all layers.

        Args:
            positions: [num_tokens] int64, below max_position_embeddings.

        Returns:
            cos (c, c) and sin (-s, s) over both halves, [num_tokens, 1, head_dim] float32 each.
        """
        cos = self.cos.index_select(0, positions).unsqueeze(1)
        sin = self.sin.index_select(0, positions).unsqueeze(1)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies the rotation in float32.

    Args:
        heads: [num_tokens, heads, head_dim].
        cos, sin: from `RotaryEmbedding.forward`.

    Returns:
        Like `heads`.
    """
    source = heads.float()
    # Rolling by half a head swaps the halves; the sign sits in sin.
    swapped = source.roll(heads.shape[-1] // 2, dims=-1)
    return torch.addcmul(source * cos, swapped, sin).to(heads.dtype)
