"""Reads safetensors checkpoints, in one file or in shards, without copying them."""

import json
import math
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
# Bytes per element. Integers and 8-bit floats belong to quantized checkpoints and mean nothing
# without their scales.
_FLOAT_SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


class CheckpointError(ValueError):
    """A checkpoint is incomplete, damaged, or does not fit its configuration."""


class Checkpoint:
    """The tensors of a directory by name; a context manager that holds the files open."""

    def __init__(self, directory: Path) -> None:
        """Opens the files and reads their headers.

        Raises:
            CheckpointError: no usable files, or they contradict the index or each other.
        """
        self.directory = directory
        self._files = ExitStack()
        self._handles: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._sizes: dict[str, int] = {}
        owners: dict[str, str] = {}
        try:
            index = self._read_index()
            for file in sorted(set(index.values())) if index is not None else [_SINGLE_FILE]:
                self._open(file, owners)
            if index is not None:
                self._compare(index, owners)
        except BaseException:
            self._files.close()
            raise

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._handles.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return self._shapes[name]

    def num_bytes(self, name: str) -> int:
        """Bytes of a tensor in its file."""
        return self._sizes[name]

    def tensor(self, name: str) -> Tensor:
        """A tensor on the CPU, backed by the mapped file.

        Raises:
            CheckpointError: the file cannot be read.
        """
        try:
            tensor: Tensor = self._handles[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.directory}: cannot read {name}: {error}") from error
        return tensor

    def _read_index(self) -> dict[str, str] | None:
        """Tensor name to file name; None when there is a single file."""
        if (self.directory / _SINGLE_FILE).is_file():
            return None
        path = self.directory / _INDEX_FILE
        try:
            content = json.loads(
                path.read_text(encoding="utf-8"), object_pairs_hook=_unique_pairs(path)
            )
        except FileNotFoundError:
            raise CheckpointError(
                f"{self.directory}: holds neither {_SINGLE_FILE} nor {_INDEX_FILE}; only "
                "safetensors checkpoints can be loaded"
            ) from None
        except CheckpointError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path}: must hold an object weight_map of tensor to file names")
        for name, file in weight_map.items():
            # A plain name only: an index must not reach outside its directory.
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(
                    f"{path}: {name} is said to be in {file!r}; a shard must be a plain file name "
                    "in the same directory"
                )
        absent = sorted(
            file for file in set(weight_map.values()) if not (self.directory / file).is_file()
        )
        if absent:
            raise CheckpointError(f"{path}: names missing files: {', '.join(absent)}")
        return weight_map

    def _open(self, file: str, owners: dict[str, str]) -> None:
        path = self.directory / file
        try:
            handle = self._files.enter_context(safe_open(path, framework="pt", device="cpu"))
            for name in handle.keys():  # noqa: SIM118
                if name in owners:
                    raise CheckpointError(
                        f"{self.directory}: {name} is in both {owners[name]} and {file}"
                    )
                view = handle.get_slice(name)
                dtype = view.get_dtype()
                if dtype not in _FLOAT_SIZES:
                    raise CheckpointError(
                        f"{path}: {name} has dtype {dtype}; supported are {', '.join(_FLOAT_SIZES)}"
                    )
                owners[name] = file
                self._handles[name] = handle
                self._shapes[name] = tuple(view.get_shape())
                self._sizes[name] = math.prod(self._shapes[name]) * _FLOAT_SIZES[dtype]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: not a complete safetensors file ({error}); fetch it again"
            ) from error

    def _compare(self, index: dict[str, str], owners: dict[str, str]) -> None:
        path = self.directory / _INDEX_FILE
        for name, file in index.items():
            if owners.get(name) != file:
                raise CheckpointError(f"{path}: says that {name} is in {file}, but it is not")
        unlisted = sorted(owners.keys() - index.keys())
        if unlisted:
            raise CheckpointError(
                f"{path}: does not list {unlisted[0]}, which is in {owners[unlisted[0]]}"
            )


def _unique_pairs(path: Path) -> Any:
    """A hook for json.loads that refuses repeated keys instead of keeping the last one."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise CheckpointError(f"{path}: names {key} twice")
            result[key] = value
        return result

    return build
