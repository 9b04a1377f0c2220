"""Packed arrays of the executor protocol: little-endian int32 and float32 in protobuf `bytes`."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]

_INT32 = np.dtype("<i4")
_FLOAT32 = np.dtype("<f4")


class WireError(ValueError):
    """A peer sent a message that breaks the executor protocol."""


def pack_int32(values: Iterable[int]) -> bytes:
    """Packs integers of any iterable or array. Raises OverflowError beyond int32."""
    if not isinstance(values, (np.ndarray, list)):
        values = list(values)
    return np.asarray(values, dtype=_INT32).tobytes()


def unpack_int32(data: bytes, field: str) -> Int32Array:
    """Returns a read-only view, int32 [len(data) / 4]. Raises WireError naming `field`."""
    return _unpack(data, _INT32, field)


def pack_float32(values: Iterable[float]) -> bytes:
    """Packs floats; `values` may be any iterable or an array."""
    if not isinstance(values, (np.ndarray, list)):
        values = list(values)
    return np.asarray(values, dtype=_FLOAT32).tobytes()


def unpack_float32(data: bytes, field: str) -> Float32Array:
    """Returns a read-only view, float32 [len(data) / 4]. Raises WireError naming `field`."""
    return _unpack(data, _FLOAT32, field)


def _unpack(data: bytes, dtype: np.dtype, field: str) -> npt.NDArray:
    if len(data) % dtype.itemsize:
        raise WireError(f"{field}: {len(data)} bytes are no whole number of {dtype.name} values")
    return np.frombuffer(data, dtype=dtype)
