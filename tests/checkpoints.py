"""Tiny random checkpoints in Hugging Face format, complete enough for the whole service."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedModel

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_CLASSES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
}
_NUM_BYTE_TOKENS = 256


def make_checkpoint(
    directory: Path,
    architecture: str = "qwen3",
    *,
    seed: int = 0,
    tied: bool = True,
    rope_scaling: dict[str, Any] | None = None,
    num_layers: int = 2,
    vocab_size: int = 320,
    max_position_embeddings: int = 512,
    shard: bool = False,
    dtype: str = "float32",
    **overrides: Any,
) -> Path:
    """Writes model, tokenizer and generation config; returns `directory`.

    Args:
        directory: created if absent.
        architecture: "qwen3", "llama", "qwen2" or "mistral".
        seed: of the weights.
        tied: whether embedding and output matrix are one.
        rope_scaling: transformers' rope parameters without rope_theta; None for plain RoPE.
        num_layers: decoder layers.
        vocab_size: rows of the output matrix; the tokenizer uses the first 259.
        max_position_embeddings: the model's length.
        shard: several files with an index instead of one.
        dtype: of the saved weights.
        overrides: further fields of the transformers configuration.
    """
    config_class, model_class = _CLASSES[architecture]
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, **(rope_scaling or {})},
        "bos_token_id": _NUM_BYTE_TOKENS,
        "eos_token_id": _NUM_BYTE_TOKENS + 2,
    }
    if architecture != "qwen2":
        fields["head_dim"] = 32
    if architecture == "mistral":
        fields["sliding_window"] = None
    config = config_class(**(fields | overrides))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        _randomise(model)
    model = model.to(getattr(torch, dtype))
    # transformers refuses to save generation flags that contradict each other; greedy by default.
    model.generation_config.do_sample = False
    num_bytes = sum(
        parameter.numel() * parameter.element_size() for parameter in model.parameters()
    )
    model.save_pretrained(directory, max_shard_size=num_bytes // 3 if shard else "5GB")
    _write_tokenizer(directory, max_position_embeddings)
    return directory


def _randomise(model: PreTrainedModel) -> None:
    """Scales the weights so that logits are spread out and every layer matters.

    With transformers' initialisation a tiny model repeats its input, because the residual stream
    stays close to the embedding and the output matrix is tied to it.
    """
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.dim() == 1:
            torch.nn.init.normal_(parameter, std=0.2)
        elif "embed_tokens" in name or "lm_head" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        else:
            torch.nn.init.normal_(parameter, std=2.0 / parameter.shape[1] ** 0.5)


def _write_tokenizer(directory: Path, max_length: int) -> None:
    # Byte-level BPE without merges: one token per byte, so that ids are easy to tell by hand.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
