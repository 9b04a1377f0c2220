"""What the scheduler knows of the model from its JSON files; the weights are the executor's."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.model_store import fingerprint
from scheduler_service.ranges import INT32_MAX, SAMPLING_RANGES


class ModelSpecError(ValueError):
    """The model directory cannot be served; the message names file and key."""


@dataclass(frozen=True, slots=True)
class DefaultSampling:
    """Values of unset sampling fields."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The served model."""

    name: str
    architecture: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    defaults: DefaultSampling
    fingerprint: str

    @classmethod
    def from_directory(cls, directory: Path, name: str) -> "ModelSpec":
        """Reads config.json and generation_config.json. Raises ModelSpecError."""
        config = _read_json(directory / "config.json", required=True)
        generation = _read_json(directory / "generation_config.json", required=False)
        vocab_size = _positive_int(config, "vocab_size")
        return cls(
            name=name,
            architecture=_architecture(config),
            vocab_size=vocab_size,
            max_model_len=_positive_int(config, "max_position_embeddings"),
            eos_token_ids=_eos_token_ids(config, generation, vocab_size),
            defaults=_defaults(generation),
            fingerprint=fingerprint(directory),
        )


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    if not required and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelSpecError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelSpecError(f"{path} holds no JSON object")
    return content


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    if names is None or names == []:
        return "unknown"
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise ModelSpecError(f"config.json: architectures must be a list of names, got {names!r}")
    return names[0]


def _positive_int(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= INT32_MAX:
        raise ModelSpecError(f"config.json: {key} must be a positive integer, got {value!r}")
    return value


def _eos_token_ids(
    config: dict[str, Any], generation: dict[str, Any], vocab_size: int
) -> tuple[int, ...]:
    """All ids that either file names and the model can produce."""
    ids: list[int] = []
    for source in (generation, config):
        value = source.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [value]:
            if not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
                continue
            if token_id not in ids:
                ids.append(token_id)
    return tuple(ids)


def _defaults(generation: dict[str, Any]) -> DefaultSampling:
    known: dict[str, Any] = {}
    for key, sampling_range in SAMPLING_RANGES.items():
        value = generation.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ModelSpecError(f"generation_config.json: {key} must be a number, got {value!r}")
        if not sampling_range.holds(value):
            raise ModelSpecError(
                f"generation_config.json: {key} must be in {sampling_range}, got {value!r}"
            )
        known[key] = int(value) if key == "top_k" else float(value)
    return DefaultSampling(**known)
