"""Loads a checkpoint's tensors straight into the model's fused parameters."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nanovllm_core.checkpoint import Checkpoint, CheckpointError
from nanovllm_core.config import ModelConfig
from nanovllm_core.model import Attention, CausalLM, DecoderLayer

__all__ = ["CheckpointError", "load_model"]

# Names in an error message; more are counted.
_MAX_NAMES = 8
_MAX_SIZE_RATIO = 4
_EMBEDDING = "model.embed_tokens.weight"
_LM_HEAD = "lm_head.weight"


def load_model(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    pack: bool = True,
) -> CausalLM:
    """Builds the model and fills it from `directory`.

    Everything is checked before the first byte is copied. Files are memory-mapped; every tensor is
    converted to `dtype` on its way into its place.

    Args:
        directory: holds model.safetensors, or model.safetensors.index.json and its shards.
        config: of the same checkpoint.
        dtype: of the parameters.
        device: of the parameters.
        on_progress: called after each tensor with bytes done and bytes in total.
        pack: whether matrices on a CPU are laid out for oneDNN; others cannot read them then.

    Raises:
        CheckpointError: files or tensors are missing, unexpected, misshapen, duplicate or damaged;
            the message names them.
    """
    with Checkpoint(directory) as checkpoint:
        _check_size(checkpoint, config)
        model = CausalLM(config, dtype, device)
        targets = _targets(model)
        _check(checkpoint, targets, config)
        total = sum(checkpoint.num_bytes(name) for name in targets)
        done = 0
        for name, target in targets.items():
            target.copy_(checkpoint.tensor(name))
            done += checkpoint.num_bytes(name)
            if on_progress is not None:
                on_progress(done, total)
    if pack and device.type == "cpu":
        model.pack_for_cpu()
    return model.eval()


def _targets(model: CausalLM) -> dict[str, Tensor]:
    """Where each tensor of a checkpoint belongs: parameters, or rows of fused ones."""
    targets: dict[str, Tensor] = {_EMBEDDING: model.embedding.data}
    for index, layer in enumerate(model.layers):
        if not isinstance(layer, DecoderLayer):
            raise TypeError(f"layer {index} is a {type(layer).__name__}, not a DecoderLayer")
        targets |= _layer_targets(f"model.layers.{index}", layer)
    targets["model.norm.weight"] = model.norm.weight.data
    if not model.config.tie_word_embeddings:
        targets[_LM_HEAD] = model.lm_head.weight.data
    return targets


def _layer_targets(prefix: str, layer: DecoderLayer) -> dict[str, Tensor]:
    targets = {
        f"{prefix}.input_layernorm.weight": layer.attention_norm.weight.data,
        f"{prefix}.post_attention_layernorm.weight": layer.mlp_norm.weight.data,
    }
    attention = layer.attention
    fused: list[tuple[torch.nn.Module, Sequence[str], Sequence[int]]] = [
        (
            attention.qkv,
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            _qkv_rows(attention),
        ),
        (attention.output, ("self_attn.o_proj",), (attention.output.weight.shape[0],)),
        (
            layer.mlp.gate_up,
            ("mlp.gate_proj", "mlp.up_proj"),
            (layer.mlp.gate_up.weight.shape[0] // 2,) * 2,
        ),
        (layer.mlp.down, ("mlp.down_proj",), (layer.mlp.down.weight.shape[0],)),
    ]
    for module, names, rows in fused:
        for kind, parameter in module.named_parameters():
            parts = parameter.data.split(list(rows))
            targets |= {
                f"{prefix}.{name}.{kind}": part for name, part in zip(names, parts, strict=True)
            }
    if attention.qk_norm:
        targets[f"{prefix}.self_attn.q_norm.weight"] = attention.query_norm.weight.data
        targets[f"{prefix}.self_attn.k_norm.weight"] = attention.key_norm.weight.data
    return targets


def _qkv_rows(attention: Attention) -> tuple[int, int, int]:
    kv_rows = attention.num_kv_heads * attention.head_dim
    return attention.num_heads * attention.head_dim, kv_rows, kv_rows


def _check_size(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Refuses a configuration of another size before memory is allocated for it.

    Says nothing of single tensors, which `_check` names; only of what is out of all proportion.
    """
    rows = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    per_layer = config.hidden_size * (rows + 3 * config.intermediate_size)
    described = config.num_layers * per_layer + config.vocab_size * config.hidden_size
    held = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names)
    if described > _MAX_SIZE_RATIO * held:
        raise CheckpointError(
            f"{checkpoint.directory}: config.json describes a model of {described} parameters, but "
            f"the checkpoint holds {held}; they do not belong together"
        )


def _check(checkpoint: Checkpoint, targets: dict[str, Tensor], config: ModelConfig) -> None:
    directory = checkpoint.directory
    missing = [name for name in targets if name not in checkpoint]
    if missing:
        raise CheckpointError(
            f"{directory}: {_listed(missing)} missing; the checkpoint does not belong to this "
            f"config.json ({config.architecture}, {config.num_layers} layers) or is incomplete"
        )
    unexpected = [
        name for name in checkpoint.names if name not in targets and not _is_redundant(name, config)
    ]
    if unexpected:
        raise CheckpointError(
            f"{directory}: {_listed(unexpected)} unexpected for {config.architecture} with "
            f"{config.num_layers} layers; the checkpoint does not belong to this config.json"
        )
    misshapen = [
        f"{name} is {list(checkpoint.shape(name))} and must be {list(target.shape)}"
        for name, target in targets.items()
        if checkpoint.shape(name) != tuple(target.shape)
    ]
    if misshapen:
        raise CheckpointError(
            f"{directory}: {_listed(misshapen)} misshapen; the checkpoint does not belong to this "
            "config.json"
        )
    if config.tie_word_embeddings and _LM_HEAD in checkpoint:
        head, embedding = checkpoint.tensor(_LM_HEAD), checkpoint.tensor(_EMBEDDING)
        if head.shape != embedding.shape or not torch.equal(head, embedding):
            raise CheckpointError(
                f"{directory}: {_LM_HEAD} differs from {_EMBEDDING} although config.json ties "
                "them; set tie_word_embeddings to false to use both"
            )


def _is_redundant(name: str, config: ModelConfig) -> bool:
    """Tensors that some checkpoints hold and nobody needs."""
    if name == _LM_HEAD:
        return config.tie_word_embeddings
    # Old exports hold the rotary frequencies, which follow from the configuration.
    return name.endswith(".rotary_emb.inv_freq")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES])
    if len(names) > _MAX_NAMES:
        shown += f" and {len(names) - _MAX_NAMES} more"
    return f"{len(names)} tensor(s) [{shown}]"
