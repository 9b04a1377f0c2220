"""The kinds of rotary position embedding (RoPE) that are supported, as configuration values."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Position interpolation: every frequency is divided by `factor` (arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1: only wavelengths that are long against the original context are stretched."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071): NTK-by-parts interpolation and a scale on the attention logits."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    # Multiplies cos and sin, and so the logits by its square.
    attention_factor: float
    # Whether the bounds of the interpolated band are rounded to whole dimensions.
    truncate: bool


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling
