"""Turns a GGUF file of the Llama architecture into a Hugging Face directory with bfloat16 weights.

Only what the catalogue needs is supported, and everything else is refused by name.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from nanovllm.embedded.bf16_safetensors import write_bf16_safetensors
from nanovllm.embedded.gguf_tokenizer import write_tokenizer

if TYPE_CHECKING:
    import gguf

#: Names outside the layers, GGUF to Hugging Face.
GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
#: Names inside layer N, after `blk.N.` and `model.layers.N.`.
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


class MissingGgufError(RuntimeError):
    """The `gguf` package is not installed."""


def convert_gguf(source: Path, directory: Path) -> None:
    """Writes config, generation config, tokenizer and weights of `source` into `directory`.

    Args:
        source: A GGUF file.
        directory: An existing directory.

    Raises:
        MissingGgufError: The `gguf` package is not installed.
        ValueError: The file holds something that this conversion does not know.
    """
    try:
        # Optional (extra `cpu`), and a quarter of a second that only a first use has to pay.
        import gguf
    except ImportError as error:
        raise MissingGgufError(
            "converting an embedded model needs the package 'gguf': "
            'pip install "nanovllm-grpc[cpu]"'
        ) from error

    reader = gguf.GGUFReader(source)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    config = _model_config(metadata, tied=all(t.name != "output.weight" for t in reader.tensors))
    _write_json(directory / "config.json", config)
    token_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(directory / "generation_config.json", token_ids)
    write_tokenizer(metadata, directory, model_max_length=config["max_position_embeddings"])

    shapes = {
        # GGUF lists dimensions from the fastest running one.
        hugging_face_name(tensor.name): tuple(int(size) for size in reversed(tensor.shape))
        for tensor in reader.tensors
    }
    write_bf16_safetensors(
        directory / "model.safetensors", shapes, _float_tensors(reader.tensors, config)
    )


def hugging_face_name(name: str) -> str:
    """Translates a GGUF tensor name.

    Raises:
        ValueError: The architecture has no such tensor.
    """
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if match is None or match[2] not in LAYER_NAMES:
        raise ValueError(f"tensor {name!r} is not part of the Llama architecture")
    return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}"


def unpermute(weight: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Puts the rows of a Q or K projection back into Hugging Face's order.

    GGUF interleaves the two halves of each head, because its rotary embedding turns neighbouring
    pairs; Hugging Face's turns element i with element i + head_dim / 2.

    Args:
        weight: [num_heads * head_dim, hidden_size]
        num_heads: Number of query heads for Q, of key-value heads for K.

    Returns:
        [num_heads * head_dim, hidden_size]
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _float_tensors(
    tensors: "list[gguf.ReaderTensor]", config: dict[str, Any]
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    import gguf

    heads_of = {
        "self_attn.q_proj.weight": config["num_attention_heads"],
        "self_attn.k_proj.weight": config["num_key_value_heads"],
    }
    for tensor in tqdm(tensors, desc="converting", unit=" tensors", disable=None):
        name = hugging_face_name(tensor.name)
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        for suffix, num_heads in heads_of.items():
            if name.endswith(suffix):
                values = unpermute(values, num_heads)
        yield name, values


def _model_config(metadata: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    architecture = metadata["general.architecture"]
    if architecture != "llama":
        raise ValueError(f"architecture {architecture!r} is not supported, only 'llama'")
    if any(key.startswith("llama.rope.scaling.") for key in metadata):
        raise ValueError("scaled rotary embeddings (llama.rope.scaling) are not supported")
    hidden_size = metadata["llama.embedding_length"]
    num_heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", num_heads),
        "head_dim": metadata.get("llama.attention.key_length", hidden_size // num_heads),
        "max_position_embeddings": metadata["llama.context_length"],
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "rms_norm_eps": _shortest(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest(metadata.get("llama.rope.freq_base", 10000.0)),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _shortest(value: float) -> float:
    """Returns the number that was meant when it was stored as float32: 1e-05, not 9.99...e-06."""
    return float(str(np.float32(value)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
