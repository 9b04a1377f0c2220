"""The model's configuration, read from config.json in the old and in the new spelling."""

from dataclasses import dataclass
from pathlib import Path

from nanovllm_core.config_reader import ConfigReader, ModelConfigError
from nanovllm_core.rope_config import read_rope
from nanovllm_core.rope_scaling import RopeScaling

__all__ = ["ModelConfig", "ModelConfigError"]

_ARCHITECTURES = ("Qwen3ForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM")
_DTYPES = ("float32", "bfloat16", "float16")
# The table of rotations has this many rows; no model is longer.
_MAX_LENGTH = 2**24
# transformers' default where a Qwen3 config.json has no head_dim.
_QWEN3_HEAD_DIM = 128


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A dense decoder-only transformer of the Llama family; all lengths count elements."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    # Qwen3 normalises every query and key head before the rotary embedding.
    qk_norm: bool
    # What the checkpoint declares: "float32", "bfloat16" or "float16".
    torch_dtype: str

    @classmethod
    def from_directory(cls, directory: Path) -> "ModelConfig":
        """Reads `directory`/config.json.

        Keys that would change the results and are not supported are refused rather than ignored.

        Raises:
            ModelConfigError: the file is missing, malformed, or describes an unsupported model.
        """
        reader = ConfigReader.open(directory / "config.json")
        architecture = _read_architecture(reader)
        _refuse_unsupported(reader, architecture)

        hidden_size = reader.positive_int("hidden_size")
        num_heads = reader.positive_int("num_attention_heads")
        num_kv_heads = reader.positive_int("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise reader.error(
                "num_key_value_heads",
                f"is {num_kv_heads}; it must divide num_attention_heads, which is {num_heads}",
            )
        max_position_embeddings = _read_length(reader)
        rope_theta, rope_scaling = read_rope(reader, max_position_embeddings)
        # One key stands for different biases in different architectures.
        is_qwen2 = architecture == "Qwen2ForCausalLM"
        attention_bias = reader.boolean("attention_bias", False) and architecture in (
            "LlamaForCausalLM",
            "Qwen3ForCausalLM",
        )
        return cls(
            architecture=architecture,
            vocab_size=reader.positive_int("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.positive_int("intermediate_size"),
            num_layers=reader.positive_int("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_read_head_dim(reader, architecture, hidden_size, num_heads),
            rms_norm_eps=reader.positive_float("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
            qkv_bias=is_qwen2 or attention_bias,
            o_bias=attention_bias,
            mlp_bias=architecture == "LlamaForCausalLM" and reader.boolean("mlp_bias", False),
            qk_norm=architecture == "Qwen3ForCausalLM",
            torch_dtype=_read_dtype(reader),
        )


def _read_length(reader: ConfigReader) -> int:
    length = reader.positive_int("max_position_embeddings")
    if length > _MAX_LENGTH:
        raise reader.error("max_position_embeddings", f"is {length}; at most {_MAX_LENGTH}")
    return length


def _read_architecture(reader: ConfigReader) -> str:
    names = reader.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in _ARCHITECTURES:
        raise reader.error(
            "architectures", f"is {names!r}; supported is one of {', '.join(_ARCHITECTURES)}"
        )
    return str(names[0])


def _read_head_dim(
    reader: ConfigReader, architecture: str, hidden_size: int, num_heads: int
) -> int:
    if reader.has("head_dim"):
        head_dim = reader.positive_int("head_dim")
    elif architecture == "Qwen3ForCausalLM":
        head_dim = _QWEN3_HEAD_DIM
    elif hidden_size % num_heads == 0:
        head_dim = hidden_size // num_heads
    else:
        raise reader.error(
            "num_attention_heads",
            f"is {num_heads}; without head_dim it must divide hidden_size, which is {hidden_size}",
        )
    if head_dim % 2:
        raise reader.error("head_dim", f"is {head_dim}; the rotary embedding needs an even number")
    return head_dim


def _read_dtype(reader: ConfigReader) -> str:
    key = "dtype" if reader.has("dtype") else "torch_dtype"
    name = reader.string(key, "float32")
    if name not in _DTYPES:
        raise reader.error(key, f"is {name!r}; supported are {', '.join(_DTYPES)}")
    return name


def _refuse_unsupported(reader: ConfigReader, architecture: str) -> None:
    activation = reader.string("hidden_act", "silu")
    if activation != "silu":
        raise reader.error("hidden_act", f"is {activation!r}; only 'silu' is supported")
    if reader.has("quantization_config"):
        raise reader.error(
            "quantization_config", "is set; only unquantized float checkpoints are supported"
        )
    if reader.boolean("use_sliding_window", False):
        raise reader.error(
            "use_sliding_window", "is true; only full attention in every layer is supported"
        )
    layer_types = reader.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise reader.error(
            "layer_types", f"is {layer_types!r}; only 'full_attention' in every layer is supported"
        )
    # Mistral's sliding window is on by default: an absent key means 4096, null means none.
    if architecture == "MistralForCausalLM" and reader.values.get("sliding_window", 4096):
        raise reader.error("sliding_window", "must be null; only full attention is supported")
