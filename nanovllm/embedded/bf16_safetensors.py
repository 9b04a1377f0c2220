"""Writing bfloat16 tensors in the safetensors format with numpy alone.

numpy has no bfloat16, and the safetensors package writes it only from torch tensors. The format is
small (https://github.com/huggingface/safetensors#format): the header's length as a little-endian
uint64, the header as JSON, then the tensors' bytes. Writing it tensor by tensor also keeps no more
than one tensor in memory.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

BF16_BYTES = 2


def to_bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Rounds float32 to bfloat16, to nearest with ties to even, as uint16 bits of the same shape.

    NaN stays NaN; values beyond the largest bfloat16 become infinite, as in IEEE 754.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # Adding half of the dropped part, minus one where the kept part is even, carries into the kept
    # part exactly when the value has to be rounded up.
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    # The same addition could carry a NaN's payload into infinity or the sign; keep it and make it
    # quiet instead.
    quiet_nan = (bits >> 16) | 0x0040
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def write_bf16_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, npt.NDArray[np.float32]]],
) -> None:
    """Writes float32 tensors as bfloat16.

    Args:
        path: The file to write.
        shapes: Every tensor's shape; the file holds them in this order.
        tensors: (name, values) in the order of `shapes`, consumed one at a time.

    Raises:
        ValueError: `tensors` does not yield exactly what `shapes` announces.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + BF16_BYTES * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts at a multiple of 8

    expected = iter(shapes.items())
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name, values in tensors:
            announced = next(expected, None)
            if announced != (name, values.shape):
                raise ValueError(f"tensor {name} {values.shape} came where {announced} was due")
            file.write(to_bfloat16_bits(values).astype("<u2", copy=False).tobytes())
    missing = next(expected, None)
    if missing is not None:
        raise ValueError(f"tensor {missing[0]} was announced but never came")
