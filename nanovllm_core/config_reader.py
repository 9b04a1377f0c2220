"""Typed access to the keys of a config.json, with errors that name file and key."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Sizes beyond it fit no tensor, and would not fit the wire either.
_MAX_INT = 2**31 - 1
_MAX_SHOWN_CHARS = 80


class ModelConfigError(ValueError):
    """A config.json is missing, malformed, or describes a model that is not supported.

    The message names the file, the key and what is supported.
    """


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """One JSON object of a config.json; `prefix` is where it stands ("" or "rope_parameters.")."""

    path: Path
    values: Mapping[str, Any]
    prefix: str = ""

    @classmethod
    def open(cls, path: Path) -> "ConfigReader":
        """Reads a file.

        Raises:
            ModelConfigError: there is no such file, or it does not hold a JSON object.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelConfigError(
                f"{path}: no such file; give a directory in Hugging Face format"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise ModelConfigError(f"{path}: cannot be read as JSON: {error}") from error
        if not isinstance(values, dict):
            raise ModelConfigError(f"{path}: must hold a JSON object")
        return cls(path, values)

    def error(self, key: str, problem: str) -> ModelConfigError:
        """An error about one key; the caller raises it."""
        return ModelConfigError(f"{self.path}: {self.prefix}{key} {problem}")

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def get(self, key: str) -> Any:
        """The raw value; None when it is absent or null."""
        return self.values.get(key)

    def child(self, key: str) -> "ConfigReader | None":
        """A nested object, or None when it is absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"must be an object, not {_shown(value)}")
        return ConfigReader(self.path, value, f"{self.prefix}{key}.")

    def positive_int(self, key: str, default: int | None = None) -> int:
        """A whole number above zero; `default` when absent, an error if that is None."""
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing; it must be a positive integer")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MAX_INT:
            raise self.error(key, f"must be a positive integer, not {_shown(value)}")
        return value

    def positive_float(self, key: str, default: float | None = None) -> float:
        """A finite number above zero; `default` when absent, an error if that is None."""
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing; it must be a positive number")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # Compared before it is converted: an integer may be too large for a float.
        if not is_number or not 0 < value <= sys.float_info.max:
            raise self.error(key, f"must be a positive number, not {_shown(value)}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """true or false; `default` when absent."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {_shown(value)}")
        return value

    def string(self, key: str, default: str) -> str:
        """A string; `default` when absent."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, not {_shown(value)}")
        return value


def _shown(value: object) -> str:
    """A value as an error message quotes it: in one line, and not at any length."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}..."
