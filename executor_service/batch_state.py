"""The batch on the device: everything an iteration needs, in tensors that are allocated once.

Row i is slot i; one more row at the end is a dummy that padding points at. Decode iterations read
and write only these tensors, so that one can follow the other without data from the host. Used by
the worker thread only.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from executor_service.plan_reader import AdmitOrder, ExecutorLimits

FINISH_NONE = 0
FINISH_STOP_TOKEN = 1
FINISH_LENGTH = 2
# The row did not produce a token; never sent.
FINISH_NOT_RUN = 3

# Columns of the packed per-slot parameters: one row is one small copy to the device.
_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
_INTS = (
    "seed",
    "top_k",
    "num_prompt_tokens",
    "num_tokens",
    "num_computed",
    "max_total_tokens",
    "min_total_tokens",
    # Tokens that the granted blocks hold.
    "capacity",
    # 1 while the slot decodes by itself.
    "active",
)


@dataclass(frozen=True, slots=True)
class RowValues:
    """Copies of the parameters of some slots, made at one moment."""

    # [len(_FLOATS), rows] and [len(_INTS), rows]: a parameter's values are contiguous.
    _floats: Tensor
    _ints: Tensor

    def floats(self, name: str) -> Tensor:
        """A float32 parameter, [rows]."""
        return self._floats[_FLOATS.index(name)]

    def ints(self, name: str) -> Tensor:
        """An int64 parameter, [rows]."""
        return self._ints[_INTS.index(name)]


class BatchState:
    """Slot state; all tensors have max_num_seqs + 1 rows."""

    def __init__(self, limits: ExecutorLimits, device: torch.device) -> None:
        rows = limits.max_num_seqs + 1
        self.limits = limits
        self.device = device
        self.dummy_row = limits.max_num_seqs
        self._floats = torch.zeros(rows, len(_FLOATS), dtype=torch.float32, device=device)
        self._ints = torch.zeros(rows, len(_INTS), dtype=torch.int64, device=device)
        # [rows, max_model_len + 1] int32: known tokens; two columns at least, for the dummy row
        self.token_ids = torch.zeros(
            rows, limits.max_model_len + 1, dtype=torch.int32, device=device
        )
        # [rows, max_blocks_per_seq] int32
        self.block_tables = torch.zeros(
            rows, limits.max_blocks_per_seq, dtype=torch.int32, device=device
        )
        # [rows, ...] int32, padded with -1
        self.stop_token_ids = torch.full(
            (rows, limits.max_stop_token_ids), -1, dtype=torch.int32, device=device
        )
        self.bias_token_ids = torch.full(
            (rows, limits.max_logit_biases), -1, dtype=torch.int32, device=device
        )
        self.bias_values = torch.zeros(rows, limits.max_logit_biases, device=device)

    def floats(self, name: str) -> Tensor:
        """A float32 parameter of every slot, [rows]."""
        return self._floats[:, _FLOATS.index(name)]

    def ints(self, name: str) -> Tensor:
        """An int64 parameter of every slot, [rows]."""
        return self._ints[:, _INTS.index(name)]

    def gather(self, rows: Tensor) -> RowValues:
        """All parameters of `rows`, [n] int64: two gathers cost less than one per parameter."""
        return RowValues(self._floats[rows].t().contiguous(), self._ints[rows].t().contiguous())

    def admit(self, orders: list[AdmitOrder]) -> None:
        """Fills slots, all with a few copies: on a GPU each costs more than what it carries."""
        slots = [order.slot for order in orders]
        rows = self._to_device(np.asarray(slots, dtype=np.int64))
        self._floats[rows] = self._to_device(
            np.asarray(
                [[getattr(order.sampling, name) for name in _FLOATS] for order in orders],
                dtype=np.float32,
            )
        )
        self._ints[rows] = self._to_device(
            np.asarray([self._int_values(order) for order in orders], dtype=np.int64)
        )
        self._scatter(self.token_ids, slots, [order.token_ids for order in orders])
        self._scatter(self.block_tables, slots, [order.block_ids for order in orders])
        for table in (self.stop_token_ids, self.bias_token_ids):
            table[rows] = -1
        self._scatter(self.stop_token_ids, slots, [order.stop_token_ids for order in orders])
        samplings = [order.sampling for order in orders]
        self._scatter(self.bias_token_ids, slots, [each.bias_token_ids for each in samplings])
        self._scatter(self.bias_values, slots, [each.bias_values for each in samplings])

    def _int_values(self, order: AdmitOrder) -> list[int]:
        values = {
            "seed": order.sampling.seed,
            "top_k": order.sampling.top_k,
            "num_prompt_tokens": order.num_prompt_tokens,
            "num_tokens": len(order.token_ids),
            "num_computed": order.num_cached_tokens,
            "max_total_tokens": order.max_total_tokens,
            "min_total_tokens": order.min_total_tokens,
            "capacity": len(order.block_ids) * self.limits.block_size,
            "active": 0,
        }
        return [values[name] for name in _INTS]

    def grant(self, slots: list[int], starts: list[int], blocks: list[npt.NDArray]) -> None:
        """Appends blocks to slots; `starts` are the numbers of blocks that they had."""
        counts = [len(new) for new in blocks]
        self._scatter(self.block_tables, slots, blocks, starts)
        capacities = np.asarray(
            [
                (start + count) * self.limits.block_size
                for start, count in zip(starts, counts, strict=True)
            ]
        )
        self.ints("capacity")[self._to_device(np.asarray(slots))] = self._to_device(capacities)

    def release(self, slots: list[int]) -> None:
        """Stops slots; what they hold is overwritten by the next owner."""
        self.ints("active")[self._to_device(np.asarray(slots))] = 0

    def clear(self) -> None:
        """Stops every slot."""
        self.ints("active").zero_()

    def _scatter(
        self,
        table: Tensor,
        slots: list[int],
        values: list[npt.NDArray],
        starts: list[int] | None = None,
    ) -> None:
        """Writes each slot's values into its row, from its start on."""
        counts = [len(each) for each in values]
        if not any(counts):
            return
        rows = np.repeat(np.asarray(slots, dtype=np.int64), counts)
        columns = np.concatenate(
            [
                np.arange(start, start + count)
                for start, count in zip(starts or [0] * len(slots), counts, strict=True)
            ]
        )
        table[self._to_device(rows), self._to_device(columns)] = self._to_device(
            np.concatenate(values)
        )

    def _to_device(self, array: npt.NDArray) -> Tensor:
        # Arrays from the wire are read-only views; the copy also makes the tensor own its memory.
        return torch.from_numpy(np.array(array)).to(self.device, non_blocking=True)
