"""Chooses launch configurations by the time of whole decode steps, not of kernels alone.

Kernels of one step overlap (programmatic dependent launch), so the fastest kernel by itself is not
always the one that makes the step fastest. Starting from `launch.py`'s tables, every table's entry
for the given number of rows is varied in turn while the others stay as they are; the winners are
printed for `launch.py`, nothing is written. The model has random weights in the shape of
Qwen3-0.6B.

    python -m benchmarks.tune_decode --rows 1
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.random_checkpoint import SHAPES
from executor_service.batch_state import BatchState
from executor_service.decode_graphs import DecodeGraphs, SamplingKind
from executor_service.plan_reader import ExecutorLimits
from nanovllm_core.attention.triton_backend import TritonBackend
from nanovllm_core.config import ModelConfig
from nanovllm_core.fused_model import FusedModel
from nanovllm_core.kernels import launch
from nanovllm_core.kernels.launch import DecodeConfig, GemvConfig, TileConfig
from nanovllm_core.kv_cache import KVCache
from nanovllm_core.model import CausalLM

_BLOCK_SIZE = 64
_REPLAYS = 40
_GEMV = [
    GemvConfig(block_n, num_warps)
    for block_n, num_warps in ((1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (4, 4), (8, 4), (8, 8))
]
_DECODE = [
    DecodeConfig(block_kv, num_warps, num_stages, target_blocks, 64, early_tile)
    for block_kv, num_warps in ((32, 1), (64, 2), (64, 4), (128, 4), (256, 8))
    for target_blocks in (128, 256, 512)
    for num_stages, early_tile in ((3, False), (1, True))
]


def tiles(columns_per_output: int, *, split: bool) -> list[TileConfig]:
    """Tensor-core configurations for up to 16 rows."""
    return [
        TileConfig(16, n // columns_per_output, k, 4, stages, split_k)
        for n, k, stages in ((16, 256, 3), (32, 128, 4), (32, 128, 6), (64, 128, 3))
        for split_k in ((2, 4) if split else (1,))
    ]


class DecodeStep:
    """One decode iteration of `rows` sequences, captured and timed."""

    def __init__(self, rows: int, context: int) -> None:
        device, dtype = torch.device("cuda"), torch.bfloat16
        config = _qwen3_config()
        model = CausalLM(config, dtype, device)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        blocks_per_seq = -(-(context + 4096) // _BLOCK_SIZE)
        self._limits = ExecutorLimits(
            vocab_size=config.vocab_size,
            num_blocks=rows * blocks_per_seq,
            block_size=_BLOCK_SIZE,
            max_num_seqs=rows,
            max_num_batched_tokens=rows + 1,
            max_model_len=blocks_per_seq * _BLOCK_SIZE,
        )
        self._rows = rows
        self._context = context
        self._state = BatchState(self._limits, device)
        self._state.block_tables[:rows] = torch.arange(
            rows * blocks_per_seq, dtype=torch.int32, device=device
        ).view(rows, blocks_per_seq)
        self._model = FusedModel(model)
        self._cache = KVCache(config, self._limits.num_blocks, _BLOCK_SIZE, dtype, device)

    @torch.inference_mode()
    def time_us(self) -> float:
        """Median time of a replay with the tables as they are now."""
        state, rows = self._state, self._rows
        state.ints("capacity")[:rows] = self._limits.max_model_len
        state.ints("max_total_tokens")[:rows] = self._limits.max_model_len
        state.ints("num_tokens")[:rows] = self._context
        state.ints("num_computed")[:rows] = self._context - 1
        state.ints("active")[:rows] = 1
        state.floats("temperature")[:rows] = 0.6
        attention = TritonBackend(self._model.config, state.device)
        graphs = DecodeGraphs(self._model, self._cache, attention, state)
        graphs.name_slots(list(range(rows)))
        graphs.iterate(rows, SamplingKind.PLAIN)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphs.iterate(rows, SamplingKind.PLAIN)
        times = []
        for _ in range(_REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            times.append((start, end))
        torch.cuda.synchronize()
        return sorted(1e3 * start.elapsed_time(end) for start, end in times)[_REPLAYS // 2]


def _qwen3_config() -> ModelConfig:
    shape: dict[str, Any] = SHAPES["qwen3-0.6b"]
    return ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_layers=shape["num_hidden_layers"],
        num_heads=shape["num_attention_heads"],
        num_kv_heads=shape["num_key_value_heads"],
        head_dim=shape["head_dim"],
        rms_norm_eps=1e-6,
        rope_theta=shape["rope_parameters"]["rope_theta"],
        rope_scaling=None,
        max_position_embeddings=shape["max_position_embeddings"],
        tie_word_embeddings=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=True,
        torch_dtype="bfloat16",
    )


def override(table: str, config: object) -> None:
    """Makes `config` the only entry of a table of `launch`."""
    setattr(launch, table, ((1 << 31, config),))


def tune(rows: int, context: int) -> Iterable[dict[str, Any]]:
    """Yields one row per configuration tried; leaves the winners in place."""
    few: list[Any] = list(_GEMV) if rows <= launch.MAX_GEMV_ROWS else []
    few += launch.RESIDENT_CANDIDATES if rows <= launch.MAX_RESIDENT_ROWS else ()
    candidates: dict[str, list[Any]] = {
        "RMS_NORM_LINEAR": few + (tiles(1, split=False) if rows > 2 else []),
        "SILU_MUL_LINEAR": few + (tiles(2, split=False) if rows > 2 else []),
        "LINEAR_RESIDUAL": few + (tiles(1, split=True) if rows > 2 else []),
        "PAGED_DECODE": _DECODE,
    }
    # The table of this GPU, in the place where all tables are varied.
    launch.PAGED_DECODE, launch.PAGED_DECODE_ON = launch.decode_table(), {}
    step = DecodeStep(rows, context)
    best_us = step.time_us()
    yield {"table": "as in launch.py", "config": "", "step_us": best_us}
    for table, configs in candidates.items():
        best: object = getattr(launch, table)
        for config in configs:
            override(table, config)
            time_us = step.time_us()
            yield {"table": table, "config": str(config), "step_us": time_us}
            if time_us < best_us:
                best_us, best = time_us, ((1 << 31, config),)
        setattr(launch, table, best)
        yield {"table": f"{table} chosen", "config": str(best), "step_us": best_us}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.tune_decode needs an NVIDIA GPU, and torch sees none", file=sys.stderr)
        return 2
    results = []
    for result in tune(arguments.rows, arguments.context):
        results.append(result)
        print(f"{result['step_us']:9.1f} us  {result['table']:24s} {result['config']}", flush=True)
    if arguments.json:
        document = {"machine": describe_machine(), "rows": arguments.rows, "results": results}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
