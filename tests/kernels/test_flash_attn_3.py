"""The adapter for FlashAttention 3, against a stand-in for its package with the same signature."""

import sys
from types import ModuleType

import pytest
import torch

from nanovllm_core.attention import BackendError, create_backend
from nanovllm_core.batch import ForwardBatch
from nanovllm_core.config import ModelConfig
from nanovllm_core.kernels.paged_decode import paged_attention_reference
from nanovllm_core.kv_cache import KVCache
from tests.checkpoints import make_checkpoint
from tests.kernels.support import assert_close, filled_cache

MODULE = "nanovllm_core.attention.flash_attn_3_backend"
BLOCK_SIZE = 16


@pytest.fixture
def config(tmp_path) -> ModelConfig:
    return ModelConfig.from_directory(make_checkpoint(tmp_path, "qwen3", num_layers=1))


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    *,
    cache_seqlens,
    page_table,
    cu_seqlens_q,
    max_seqlen_q,
    softmax_scale,
    causal,
):
    """What the package's function of this name does with these arguments."""
    assert causal
    assert cu_seqlens_q.dtype == cache_seqlens.dtype == page_table.dtype == torch.int32
    assert max_seqlen_q >= cu_seqlens_q.diff().max()
    out = paged_attention_reference(
        q, k_cache, v_cache, page_table, cu_seqlens_q, cache_seqlens, softmax_scale
    )
    return out.to(q.dtype)


def test_chunks_of_different_lengths_read_the_paged_cache(config, device, monkeypatch):
    package = ModuleType("flash_attn_interface")
    package.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    backend = create_backend("flash_attn_3", config, device)

    prefill_lens, context_lens = [20, 3], [20, 40]
    key, value, tables = filled_cache(
        context_lens, BLOCK_SIZE, config.num_kv_heads, config.head_dim, torch.float32, device
    )
    cache = KVCache(config, key.shape[0], BLOCK_SIZE, torch.float32, device)
    cache.key[0, : key.shape[0]], cache.value[0, : key.shape[0]] = key, value
    query = torch.randn(23, config.num_heads, config.head_dim, device=device)
    lens = torch.tensor(context_lens, dtype=torch.int32, device=device)
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    batch = ForwardBatch(
        token_ids=nothing,
        positions=nothing,
        slot_mapping=nothing,
        block_tables=tables,
        context_lens=lens,
        prefill_lens=prefill_lens,
        prefill_context_lens=context_lens,
        max_decode_context_len=0,
        logits_rows=nothing,
    )
    backend.prepare(batch, cache)
    starts = torch.tensor([0, 20, 23])
    scale = config.head_dim**-0.5
    expected = paged_attention_reference(query, key, value, tables, starts, lens, scale)
    assert_close(backend.attend(0, query, cache, batch), expected)


def test_without_the_package_the_message_says_what_to_choose(config, device, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(BackendError, match="install what it needs or choose 'torch'"):
        create_backend("flash_attn_3", config, device)
