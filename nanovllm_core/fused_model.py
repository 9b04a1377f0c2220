"""The model on a GPU, made of fused kernels.

`CausalLM` defines the computation; this class runs it with the weights of a loaded one. Few rows
(decode) are bound by the weights' bytes and by launches, so a layer is five kernels that read their
weights while the kernel before them finishes. Many rows (prefill) are bound by arithmetic and go
through cuBLAS, with fused kernels between the products.

An RMSNorm in front of a product is its weight, which is folded into the matrix, and a scale for
each row. A product by cuBLAS leaves the scale out, and the kernel behind it applies it.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nanovllm_core.attention import AttentionBackend
from nanovllm_core.attention.triton_backend import TritonBackend
from nanovllm_core.batch import ForwardBatch
from nanovllm_core.kernels.add_rms_norm import add_rms_norm, rms_norm
from nanovllm_core.kernels.device import supports_dependent_launch
from nanovllm_core.kernels.launch import MAX_LM_HEAD_ROWS, MAX_RESIDENT_ROWS
from nanovllm_core.kernels.linear_residual import linear_residual, linear_residual_workspace_size
from nanovllm_core.kernels.lm_head_sample import lm_head_sample
from nanovllm_core.kernels.qk_norm_rope_cache import qk_norm_rope_cache
from nanovllm_core.kernels.rms_norm_linear import fold_norm_weight, rms_norm_linear
from nanovllm_core.kernels.silu_and_mul import silu_and_mul
from nanovllm_core.kernels.silu_mul_linear import silu_mul_linear
from nanovllm_core.kernels.workspace import Workspace
from nanovllm_core.kv_cache import KVCache
from nanovllm_core.model import CausalLM, DecoderLayer

# Up to this many rows the fused linear kernels beat cuBLAS with separate kernels around it.
MAX_FUSED_ROWS = 64
# The same for QKV with its norm, which cuBLAS does well where its weights are not resident.
MAX_FUSED_QKV_ROWS = MAX_RESIDENT_ROWS


class FusedModel:
    """Runs a `CausalLM` on a GPU. Takes it over: the norms' weights move into its matrices."""

    def __init__(self, model: CausalLM) -> None:
        """Folds the norms in front of QKV and gate-up into those matrices, in place."""
        self.config = model.config
        self.embedding = model.embedding
        self._model = model
        self._layers: list[DecoderLayer] = list(model.layers)  # type: ignore[arg-type]
        self._eps = model.config.rms_norm_eps
        device, dtype = model.embedding.device, model.embedding.dtype
        for layer in self._layers:
            for linear, norm in (
                (layer.attention.qkv, layer.attention_norm),
                (layer.mlp.gate_up, layer.mlp_norm),
            ):
                linear.weight.data.copy_(fold_norm_weight(linear.weight, norm.weight))
        # The weights are in the matrices; what is left of those norms is the scaling.
        self._ones = torch.ones(self.config.hidden_size, dtype=dtype, device=device)
        # Whether kernels are launched before those in front of them have ended.
        self.dependent = supports_dependent_launch(device)
        # Biases behind attention and in the MLP have no place in the fused kernels.
        has_biases = self.config.o_bias or self.config.mlp_bias
        self._max_fused_rows = 0 if has_biases else MAX_FUSED_ROWS
        # A bias belongs behind the scale, and float16 may not hold what has not been scaled.
        self._scales_qkv_late = dtype != torch.float16 and not self.config.qkv_bias
        self._scales_late = self._scales_qkv_late and not has_biases
        sizes = [
            linear_residual_workspace_size(rows, self.config.hidden_size)
            for rows in range(1, MAX_FUSED_ROWS + 1)
        ]
        self._workspace = Workspace.allocate(
            max(values for values, _ in sizes), max(counters for _, counters in sizes), device
        )

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, cache: KVCache, attention: AttentionBackend) -> Tensor:
        """Like `CausalLM.forward`: [num_tokens, hidden_size] after the final norm."""
        attention.prepare(batch, cache)
        hidden = F.embedding(batch.token_ids, self.embedding)
        return self.final_norm(self.run_layers(hidden, batch, cache, attention))

    __call__ = forward

    def run_layers(
        self, hidden: Tensor, batch: ForwardBatch, cache: KVCache, attention: AttentionBackend
    ) -> Tensor:
        """Runs all layers over embedded tokens and writes their KV to the cache.

        Args:
            hidden: [num_tokens, hidden_size], overwritten.
            batch: what `attention` was prepared for; its token ids are not read.
            cache: the pool.
            attention: the backend.

        Returns:
            [num_tokens, hidden_size], before the final norm.
        """
        if hidden.shape[0] <= self._max_fused_rows:
            return self._run_few_rows(hidden, batch, cache, attention)
        return self._run_many_rows(hidden, batch, cache, attention)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """[rows, hidden_size] to the same."""
        return self._model.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden_size] after the final norm to [rows, vocab_size] float32."""
        return self._model.logits(hidden)

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """The same in the model's own type, for samplers that widen while they read."""
        return self._model.lm_head(hidden)

    def sample_head(
        self, hidden: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor
    ) -> Tensor | None:
        """Final norm, output matrix and a greedy or temperature draw in one kernel.

        Returns:
            [rows] int32 tokens, or None if there are too many rows for it.
        """
        if hidden.shape[0] > MAX_LM_HEAD_ROWS:
            return None
        return lm_head_sample(
            hidden,
            self._model.lm_head.weight,
            temperature,
            seeds,
            positions,
            norm_weight=self._model.norm.weight,
            eps=self._eps,
            dependent=self.dependent,
        )

    def _run_few_rows(
        self, hidden: Tensor, batch: ForwardBatch, cache: KVCache, attention: AttentionBackend
    ) -> Tensor:
        dependent = self.dependent
        for index, layer in enumerate(self._layers):
            mlp = layer.mlp
            qkv, unscaled = self._project_qkv(hidden, layer, is_first=index == 0)
            attended = self._attend(index, layer, qkv, batch, cache, attention, unscaled)
            linear_residual(
                attended,
                layer.attention.output.weight,
                hidden,
                self._workspace,
                dependent=dependent,
            )
            gated = silu_mul_linear(hidden, mlp.gate_up.weight, eps=self._eps, dependent=dependent)
            linear_residual(gated, mlp.down.weight, hidden, self._workspace, dependent=dependent)
        return hidden

    def _project_qkv(
        self, hidden: Tensor, layer: DecoderLayer, *, is_first: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The projection, and hidden if it lacks the norm's scale."""
        qkv, dependent = layer.attention.qkv, self.dependent
        if hidden.shape[0] <= MAX_FUSED_QKV_ROWS:
            projected = rms_norm_linear(
                hidden,
                qkv.weight,
                self._eps,
                bias=qkv.bias,
                dependent=dependent,
                starts_chain=is_first,
            )
            return projected, None
        if self._scales_qkv_late:
            return qkv(hidden), hidden
        return qkv(rms_norm(hidden, self._ones, self._eps, dependent=dependent)), None

    def _run_many_rows(
        self, hidden: Tensor, batch: ForwardBatch, cache: KVCache, attention: AttentionBackend
    ) -> Tensor:
        if not self._scales_late:
            return self._run_with_norms(hidden, batch, cache, attention)
        for index, layer in enumerate(self._layers):
            module, mlp = layer.attention, layer.mlp
            qkv = module.qkv(hidden)
            attended = self._attend(index, layer, qkv, batch, cache, attention, hidden)
            hidden.addmm_(attended, module.output.weight.t())
            gated = silu_and_mul(mlp.gate_up(hidden), hidden, self._eps)
            hidden.addmm_(gated, mlp.down.weight.t())
        return hidden

    def _run_with_norms(
        self, hidden: Tensor, batch: ForwardBatch, cache: KVCache, attention: AttentionBackend
    ) -> Tensor:
        # What the block before has yet to add to the residual stream.
        delta = torch.zeros_like(hidden)
        for index, layer in enumerate(self._layers):
            normed = add_rms_norm(delta, hidden, self._ones, self._eps)
            qkv = layer.attention.qkv(normed)
            delta = layer.attention.output(self._attend(index, layer, qkv, batch, cache, attention))
            normed = add_rms_norm(delta, hidden, self._ones, self._eps)
            delta = layer.mlp.down(silu_and_mul(layer.mlp.gate_up(normed)))
        return hidden.add_(delta)

    def _attend(
        self,
        index: int,
        layer: DecoderLayer,
        qkv: Tensor,
        batch: ForwardBatch,
        cache: KVCache,
        attention: AttentionBackend,
        unscaled: Tensor | None = None,
    ) -> Tensor:
        """QK norm, rotation, cache write and attention: [rows, num_heads * head_dim].

        qkv lacks the scale of the norm over the rows of `unscaled`, if that is given.
        """
        module, rotary = layer.attention, self._model.rotary
        norm_weights: tuple[Tensor | None, Tensor | None] = (None, None)
        if module.qk_norm:
            norm_weights = (module.query_norm.weight, module.key_norm.weight)
        rotation = (rotary.cos, rotary.sin)
        if not batch.prefill_lens and isinstance(attention, TritonBackend):
            attended = attention.decode_qkv(
                index, qkv, norm_weights, rotation, cache, batch, unscaled
            )
            if attended is not None:
                return attended.flatten(1)
        query = qk_norm_rope_cache(
            qkv,
            *norm_weights,
            self._eps,
            *rotation,
            batch.positions,
            batch.slot_mapping,
            cache.key[index],
            cache.value[index],
            self.config.num_heads,
            hidden=unscaled,
            dependent=self.dependent,
        )
        return attention.attend(index, query, cache, batch).flatten(1)
