"""What the scheduler reads of a model directory."""

import json
from pathlib import Path

import pytest

from nanovllm.model_store import fingerprint
from scheduler_service.model_spec import DefaultSampling, ModelSpec, ModelSpecError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write(tmp_path, "config.json", CONFIG)
    return tmp_path


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}


def write(directory: Path, name: str, content: object) -> None:
    (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_real_directory_is_read(checkpoint: Path):
    model = ModelSpec.from_directory(checkpoint, "tiny")
    assert (model.name, model.architecture) == ("tiny", "Qwen3ForCausalLM")
    assert (model.vocab_size, model.max_model_len) == (320, 512)
    assert model.eos_token_ids == (258,)
    assert model.fingerprint == fingerprint(checkpoint)


def test_without_a_generation_config_the_general_defaults_hold(directory: Path):
    assert ModelSpec.from_directory(directory, "m").defaults == DefaultSampling()


def test_end_tokens_of_both_files_count_once_each_in_order(directory: Path):
    write(directory, "generation_config.json", {"eos_token_id": [7, 2, 7]})
    assert ModelSpec.from_directory(directory, "m").eos_token_ids == (7, 2)


def test_end_tokens_that_the_model_cannot_produce_are_left_out(directory: Path):
    write(directory, "generation_config.json", {"eos_token_id": [320, -1, None, 5]})
    assert ModelSpec.from_directory(directory, "m").eos_token_ids == (5, 2)


def test_sampling_defaults_come_from_the_generation_config(directory: Path):
    write(directory, "generation_config.json", {"temperature": 0.6, "top_k": 20, "min_p": None})
    assert ModelSpec.from_directory(directory, "m").defaults == DefaultSampling(
        temperature=0.6, top_k=20
    )


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", [1], "holds no JSON object"),
        ("config.json", CONFIG | {"vocab_size": 0}, "vocab_size must be a positive integer"),
        ("config.json", {"vocab_size": 3}, "max_position_embeddings must be"),
        ("generation_config.json", {"top_p": "high"}, "top_p must be a number, got 'high'"),
        ("config.json", CONFIG | {"vocab_size": True}, "vocab_size must be a positive integer"),
        ("config.json", CONFIG | {"vocab_size": 2**31}, "vocab_size must be a positive integer"),
        ("config.json", CONFIG | {"architectures": {"a": 1}}, "architectures must be a list"),
        ("config.json", CONFIG | {"architectures": "Llama"}, "architectures must be a list"),
        ("config.json", CONFIG | {"architectures": [1]}, "architectures must be a list"),
        ("generation_config.json", '{"top_k": Infinity}', r"top_k must be in \[-1, 2147483647\]"),
        ("generation_config.json", '{"temperature": NaN}', r"temperature must be in \[0, 100\]"),
        ("generation_config.json", {"temperature": -1}, r"temperature must be in \[0, 100\]"),
        ("generation_config.json", {"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
        ("generation_config.json", {"min_p": 1.5}, r"min_p must be in \[0, 1\]"),
        ("generation_config.json", {"repetition_penalty": 0}, "repetition_penalty must be in"),
        ("generation_config.json", "", "generation_config.json cannot be read"),
    ],
)
def test_a_file_that_makes_no_sense_is_named_with_its_key(
    directory: Path, name: str, content: object, problem: str
):
    write(directory, name, content)
    with pytest.raises(ModelSpecError, match=problem):
        ModelSpec.from_directory(directory, "m")


def test_a_directory_without_config_is_refused(tmp_path: Path):
    with pytest.raises(ModelSpecError, match=r"config\.json"):
        ModelSpec.from_directory(tmp_path, "m")
