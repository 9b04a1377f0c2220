"""A tiny Llama checkpoint as a GGUF file, quantized and permuted as llama.cpp does it."""

from pathlib import Path

import gguf
import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

HIDDEN_SIZE = 64
NUM_HEADS = 4
NUM_KV_HEADS = 2
HEAD_DIM = HIDDEN_SIZE // NUM_HEADS
INTERMEDIATE_SIZE = 96
NUM_LAYERS = 2
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he"]
TOKENS = [*SPECIAL_TOKENS, *bytes_to_unicode().values(), "Ġt", "he", "Ġthe", "<think>"]
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to Q and K of a Hugging Face checkpoint."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights by Hugging Face name."""
    generator = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return generator.standard_normal((rows, columns), dtype=np.float32) * 0.1

    weights = {"model.embed_tokens.weight": matrix(len(TOKENS), HIDDEN_SIZE)}
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}."
        shapes = {
            "self_attn.q_proj": (NUM_HEADS * HEAD_DIM, HIDDEN_SIZE),
            "self_attn.k_proj": (NUM_KV_HEADS * HEAD_DIM, HIDDEN_SIZE),
            "self_attn.v_proj": (NUM_KV_HEADS * HEAD_DIM, HIDDEN_SIZE),
            "self_attn.o_proj": (HIDDEN_SIZE, NUM_HEADS * HEAD_DIM),
            "mlp.gate_proj": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
            "mlp.up_proj": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
            "mlp.down_proj": (HIDDEN_SIZE, INTERMEDIATE_SIZE),
        }
        for name, shape in shapes.items():
            weights[f"{prefix}{name}.weight"] = matrix(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = 1 + matrix(1, HIDDEN_SIZE)[0]
    weights["model.norm.weight"] = 1 + matrix(1, HIDDEN_SIZE)[0]
    return weights


def write_gguf(path: Path, weights: dict[str, np.ndarray], **extra_tensors: np.ndarray) -> None:
    """Writes the weights as Q8_0 (matrices) and F32 (vectors)."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(NUM_LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN_SIZE)
    writer.add_feed_forward_length(INTERMEDIATE_SIZE)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    kinds = [3 if token in SPECIAL_TOKENS else 4 if token == "<think>" else 1 for token in TOKENS]
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, values in weights.items():
        gguf_name = _gguf_name(name)
        if gguf_name.endswith(("attn_q.weight", "attn_k.weight")):
            values = permute(values, NUM_HEADS if "attn_q" in gguf_name else NUM_KV_HEADS)
        if values.ndim == 1:
            writer.add_tensor(gguf_name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name, gguf.quantize(values, kind), raw_dtype=kind)
    for name, values in extra_tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dequantized(values: np.ndarray) -> np.ndarray:
    """What is left of float32 values after Q8_0."""
    if values.ndim == 1:
        return values
    kind = gguf.GGMLQuantizationType.Q8_0
    return gguf.dequantize(gguf.quantize(values, kind), kind)


def _gguf_name(name: str) -> str:
    names = {
        "model.embed_tokens.": "token_embd.",
        "model.norm.": "output_norm.",
        "model.layers.": "blk.",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
    }
    for theirs, ours in names.items():
        name = name.replace(theirs, ours)
    return name
