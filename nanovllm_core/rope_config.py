"""Reads the rotary embedding's parameters from a config.json, in its old and its new spelling.

Old files have `rope_theta` and `rope_scaling` {"type" or "rope_type", ...} at the top level; files
written by transformers 5 have `rope_parameters` {"rope_type", "rope_theta", ...}. Defaults and
formulas follow transformers' modeling_rope_utils.py.
"""

import math

from nanovllm_core.config_reader import ConfigReader
from nanovllm_core.rope_scaling import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

_DEFAULT_THETA = 10_000.0
# Far beyond any length; what is not would overflow the formulas.
_MAX_ROTATIONS = 1_000_000
_KINDS = ("default", "linear", "llama3", "yarn")


def read_rope(
    reader: ConfigReader, max_position_embeddings: int
) -> tuple[float, RopeScaling | None]:
    """Reads base and scaling.

    Args:
        reader: the top-level object of the config.json.
        max_position_embeddings: the model's length, the default of the original length.

    Returns:
        rope_theta, and the scaling or None.

    Raises:
        ModelConfigError: the kind is unknown, or a parameter is missing or out of range.
    """
    # An empty object says as little as an absent one.
    scaling = reader.child("rope_scaling")
    if scaling is None or not scaling.values:
        scaling = reader.child("rope_parameters")
    if scaling is None:
        scaling = ConfigReader(reader.path, {}, "rope_parameters.")
    if any(isinstance(value, dict) for value in scaling.values.values()):
        raise reader.error(
            scaling.prefix.rstrip("."), "differs between layers; only one set is supported"
        )

    for owner in (reader, scaling):
        factor = owner.get("partial_rotary_factor")
        if factor not in (None, 1):
            raise owner.error(
                "partial_rotary_factor", f"is {factor!r}; only 1 (whole heads) is supported"
            )
    theta = scaling.positive_float(
        "rope_theta", reader.positive_float("rope_theta", _DEFAULT_THETA)
    )
    kind = scaling.string("rope_type", scaling.string("type", "default"))
    if kind not in _KINDS:
        raise scaling.error("rope_type", f"is {kind!r}; supported are {', '.join(_KINDS)}")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearScaling(scaling.positive_float("factor"))

    original_length = reader.positive_int(
        "original_max_position_embeddings",
        scaling.positive_int("original_max_position_embeddings", max_position_embeddings),
    )
    if kind == "llama3":
        return theta, _read_llama3(scaling, original_length)
    if theta <= 1:
        raise scaling.error("rope_theta", f"is {theta}; yarn needs a base above 1")
    return theta, _read_yarn(scaling, original_length, max_position_embeddings)


def _read_llama3(scaling: ConfigReader, original_length: int) -> Llama3Scaling:
    low = scaling.positive_float("low_freq_factor")
    high = scaling.positive_float("high_freq_factor")
    if high <= low:
        raise scaling.error("high_freq_factor", f"is {high}; it must be above low_freq_factor")
    return Llama3Scaling(scaling.positive_float("factor"), low, high, original_length)


def _read_yarn(
    scaling: ConfigReader, original_length: int, max_position_embeddings: int
) -> YarnScaling:
    factor = scaling.positive_float("factor", max_position_embeddings / original_length)
    if scaling.has("attention_factor"):
        attention_factor = scaling.positive_float("attention_factor")
    elif scaling.get("mscale") and scaling.get("mscale_all_dim"):
        attention_factor = _yarn_mscale(factor, scaling.positive_float("mscale")) / _yarn_mscale(
            factor, scaling.positive_float("mscale_all_dim")
        )
    else:
        attention_factor = _yarn_mscale(factor, 1.0)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original_length,
        beta_fast=_read_rotations(scaling, "beta_fast", 32.0),
        beta_slow=_read_rotations(scaling, "beta_slow", 1.0),
        attention_factor=attention_factor,
        truncate=scaling.boolean("truncate", True),
    )


def _read_rotations(scaling: ConfigReader, key: str, default: float) -> float:
    value = scaling.positive_float(key, default)
    if not 1 / _MAX_ROTATIONS <= value <= _MAX_ROTATIONS:
        raise scaling.error(key, f"is {value}; at most {_MAX_ROTATIONS} and at least its inverse")
    return value


def _yarn_mscale(factor: float, mscale: float) -> float:
    """Equation 22 of arXiv:2309.00071 with a weight on the logarithm."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
