"""The transformer: one class for the whole Llama family, steered by `ModelConfig`."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from nanovllm_core.attention import AttentionBackend
from nanovllm_core.batch import ForwardBatch
from nanovllm_core.config import ModelConfig
from nanovllm_core.kv_cache import KVCache
from nanovllm_core.layers import Linear, RMSNorm, empty_parameter
from nanovllm_core.rope import RotaryEmbedding, rotate


class Attention(nn.Module):
    """Self-attention with one fused projection; rows of `qkv` are q heads, k heads, v heads."""

    def __init__(
        self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.qkv = Linear(
            config.hidden_size,
            (config.num_heads + 2 * config.num_kv_heads) * config.head_dim,
            bias=config.qkv_bias,
            dtype=dtype,
            device=device,
        )
        self.output = Linear(
            config.num_heads * config.head_dim,
            config.hidden_size,
            bias=config.o_bias,
            dtype=dtype,
            device=device,
        )
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype, device)
            self.key_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype, device)

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        batch: ForwardBatch,
        cache: KVCache,
        attention: AttentionBackend,
    ) -> Tensor:
        """[num_tokens, hidden_size] to the same; writes the tokens' KV to the cache first."""
        heads = self.qkv(hidden).unflatten(1, (-1, self.head_dim))
        num_rotated = self.num_heads + self.num_kv_heads
        rotated = heads[:, :num_rotated]
        if self.qk_norm:
            query, key = rotated.split((self.num_heads, self.num_kv_heads), dim=1)
            rotated = torch.cat((self.query_norm(query), self.key_norm(key)), dim=1)
        query, key = rotate(rotated, *rotation).split((self.num_heads, self.num_kv_heads), dim=1)
        cache.write(self.layer, key, heads[:, num_rotated:], batch.slot_mapping)
        return self.output(attention.attend(self.layer, query, cache, batch).flatten(1))


class MLP(nn.Module):
    """SwiGLU with one fused projection; rows of `gate_up` are the gate's, then the other's."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.gate_up = Linear(
            config.hidden_size,
            2 * config.intermediate_size,
            bias=config.mlp_bias,
            dtype=dtype,
            device=device,
        )
        self.down = Linear(
            config.intermediate_size,
            config.hidden_size,
            bias=config.mlp_bias,
            dtype=dtype,
            device=device,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """[num_tokens, hidden_size] to the same."""
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))


class DecoderLayer(nn.Module):
    """One pre-norm layer on the residual stream."""

    def __init__(
        self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.attention = Attention(config, layer, dtype, device)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.mlp = MLP(config, dtype, device)

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        batch: ForwardBatch,
        cache: KVCache,
        attention: AttentionBackend,
    ) -> Tensor:
        """[num_tokens, hidden_size] to the same, in place: nobody else holds the stream."""
        hidden += self.attention(self.attention_norm(hidden), rotation, batch, cache, attention)
        hidden += self.mlp(self.mlp_norm(hidden))
        return hidden


class CausalLM(nn.Module):
    """A decoder-only language model. Parameters are uninitialised until `load_model` fills them."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.embedding = empty_parameter(
            config.vocab_size, config.hidden_size, dtype=dtype, device=device
        )
        self.rotary = RotaryEmbedding(config, device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, dtype, device) for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        # A tied head borrows the embedding; its own parameter is never touched, so a meta tensor
        # spares the memory.
        head_device = torch.device("meta") if config.tie_word_embeddings else device
        self.lm_head = Linear(
            config.hidden_size, config.vocab_size, dtype=dtype, device=head_device
        )
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embedding

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, cache: KVCache, attention: AttentionBackend) -> Tensor:
        """Runs the layers and writes the tokens' KV to the cache.

        Returns:
            [num_tokens, hidden_size], after the final norm; pick `batch.logits_rows` from it before
            calling `logits`.
        """
        attention.prepare(batch, cache)
        rotation = self.rotary(batch.positions)
        hidden = F.embedding(batch.token_ids, self.embedding)
        for layer in self.layers:
            hidden = layer(hidden, rotation, batch, cache, attention)
        return self.norm(hidden)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Projects onto the vocabulary: [rows, hidden_size] to [rows, vocab_size] float32."""
        return self.lm_head(hidden).float()

    def pack_for_cpu(self) -> None:
        """Lays the matrices out for oneDNN; to be called once, after loading, on a CPU.

        A tied output matrix is packed as a copy, because the embedding lookup needs plain rows.
        """
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()
