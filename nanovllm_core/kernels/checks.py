"""Argument checks of the kernel launchers: a wrong stride must be an error, not a wrong result."""

import torch
from torch import Tensor


class KernelInputError(ValueError):
    """A tensor or size handed to a kernel launcher does not fit; the message says which and how."""


def require_matrix(name: str, tensor: Tensor, rows: int | None, columns: int | None) -> None:
    """Refuse anything but a row-major contiguous matrix of the given shape (None: any extent)."""
    fits = (
        tensor.dim() == 2
        and (rows is None or tensor.shape[0] == rows)
        and (columns is None or tensor.shape[1] == columns)
    )
    if not fits:
        wanted = ["any" if extent is None else extent for extent in (rows, columns)]
        raise KernelInputError(
            f"{name} must have shape [{wanted[0]}, {wanted[1]}], got {list(tensor.shape)}"
        )
    require_contiguous(name, tensor)


def require_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise KernelInputError(
            f"{name} must be contiguous, got shape {list(tensor.shape)} with strides "
            f"{list(tensor.stride())}; pass {name}.contiguous()"
        )


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse anything but a contiguous tensor of exactly this shape."""
    if tuple(tensor.shape) != shape:
        raise KernelInputError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    require_contiguous(name, tensor)


def require_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise KernelInputError(f"{name} must be {dtype}, got {tensor.dtype}")


def require_row_values(name: str, tensor: Tensor, rows: int, dtype: torch.dtype) -> None:
    """Refuse anything but a contiguous vector with one value of `dtype` per row."""
    require_shape(name, tensor, (rows,))
    require_dtype(name, tensor, dtype)


def require_unscaled_input(hidden: Tensor | None, projected: Tensor) -> int:
    """Refuse a `hidden` that has other rows or another dtype than what was projected from it.

    Returns:
        hidden's columns; 0 for None.
    """
    if hidden is None:
        return 0
    require_matrix("hidden", hidden, projected.shape[0], None)
    require_dtype("hidden", hidden, projected.dtype)
    return hidden.shape[1]
