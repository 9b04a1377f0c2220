import json
from pathlib import Path
from typing import Any

import pytest

from nanovllm_core.config import ModelConfig, ModelConfigError
from nanovllm_core.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling
from tests.checkpoints import make_checkpoint

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}


def read(directory: Path, fields: dict[str, Any]) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(fields))
    return ModelConfig.from_directory(directory)


def test_old_spelling_is_read(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA)
    assert (config.rope_theta, config.rope_scaling) == (500000.0, None)
    assert (config.torch_dtype, config.head_dim, config.num_kv_heads) == ("bfloat16", 16, 2)
    assert not any((config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm))
    assert not config.tie_word_embeddings


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen2", "mistral"])
def test_files_of_transformers_are_read(tmp_path: Path, architecture: str) -> None:
    config = ModelConfig.from_directory(
        make_checkpoint(
            tmp_path,
            architecture,
            rope_scaling={"rope_type": "linear", "factor": 2.0, "rope_theta": 2500.0},
        )
    )
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (2, 4, 2)
    assert config.head_dim == (16 if architecture == "qwen2" else 32)
    assert (config.rope_theta, config.rope_scaling) == (2500.0, LinearScaling(2.0))
    assert config.tie_word_embeddings
    assert config.torch_dtype == "float32"
    assert config.qk_norm == (architecture == "qwen3")
    assert config.qkv_bias == (architecture == "qwen2")
    assert not config.o_bias


def test_attention_bias_means_all_four_projections_of_llama(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert config.qkv_bias
    assert config.o_bias
    assert config.mlp_bias


def test_missing_kv_heads_mean_one_per_head(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA | {"num_key_value_heads": None})
    assert config.num_kv_heads == 4


def test_old_rope_scaling_with_type_is_read(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA | {"rope_scaling": {"type": "linear", "factor": 4}})
    assert config.rope_scaling == LinearScaling(4.0)


def test_llama3_scaling_is_read(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = read(tmp_path, LLAMA | {"rope_scaling": scaling})
    assert config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 64)


def test_yarn_defaults_follow_the_paper(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    scaling = config.rope_scaling
    assert isinstance(scaling, YarnScaling)
    assert (scaling.beta_fast, scaling.beta_slow, scaling.truncate) == (32.0, 1.0, True)
    assert scaling.original_max_position_embeddings == 256
    assert scaling.attention_factor == pytest.approx(1.1386294)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures"),
        ({"architectures": None}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"architectures": ["MistralForCausalLM"]}, "sliding_window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 6}, "num_attention_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_what_would_be_wrong_is_refused_by_file_and_key(
    tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    with pytest.raises(ModelConfigError) as caught:
        read(tmp_path, LLAMA | change)
    assert key in str(caught.value)
    assert "config.json" in str(caught.value)


def test_mistral_with_a_null_window_is_accepted(tmp_path: Path) -> None:
    fields = LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": None}
    assert read(tmp_path, fields).architecture == "MistralForCausalLM"


@pytest.mark.parametrize("content", ["", "[1]", "{", "\xff"])
def test_malformed_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelConfigError, match=r"config\.json"):
        ModelConfig.from_directory(tmp_path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match="no such file"):
        ModelConfig.from_directory(tmp_path)
