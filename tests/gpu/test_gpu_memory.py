"""What the executor says of the GPU's memory."""

from collections.abc import Callable

import torch

from executor_service.engine_factory import create_engine
from executor_service.settings import ExecutorSettings
from nanovllm_core.config import ModelConfig
from nanovllm_core.kv_cache import KVCache
from tests.gpu.conftest import Tiny
from tests.gpu.support import NEEDS_GPU

pytestmark = NEEDS_GPU

NUM_BLOCKS = 64
BLOCK_SIZE = 64


def test_weights_and_kv_cache_are_accounted_for(tiny: Callable[[str, str], Tiny]) -> None:
    checkpoint = tiny("qwen3", "bfloat16").checkpoint
    settings = ExecutorSettings(
        device="cuda",
        attention_backend="triton",
        num_kv_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_num_seqs=4,
        enforce_eager=True,
    )
    memory = create_engine(checkpoint, settings).gpu_memory
    assert memory is not None
    config = ModelConfig.from_directory(checkpoint)
    # One block more than plans may use, for padding.
    block_bytes = KVCache.bytes_per_block(config, BLOCK_SIZE, torch.bfloat16)
    assert memory.kv_cache_bytes == (NUM_BLOCKS + 1) * block_bytes
    on_disk = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert memory.weight_bytes > 0.9 * on_disk
    assert memory.reserved_bytes() >= memory.weight_bytes + memory.kv_cache_bytes
