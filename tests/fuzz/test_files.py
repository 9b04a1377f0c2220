"""A model directory with a wrong file is refused in one line; nothing else happens.

Nothing else means: no exception of another type, no memory for sizes that only a file claims, no
loop over them.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.model_store import ModelNotFoundError, fingerprint
from nanovllm_core.config import ModelConfig
from nanovllm_core.config_reader import ModelConfigError
from nanovllm_core.loader import CheckpointError, load_model
from scheduler_service.model_spec import ModelSpec, ModelSpecError
from scheduler_service.text.tokenizer import Tokenizer
from tests.fuzz.files import (
    JSON_VALUES,
    join_safetensors,
    mutated_json,
    nested,
    split_safetensors,
    with_value,
)

CPU = torch.device("cpu")
TYPED = (ModelConfigError, CheckpointError, ModelSpecError, ModelNotFoundError)
MAX_MESSAGE_CHARS = 2000
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)
ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "linear", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {
        "rope_type": "yarn",
        "factor": 2.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 256,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
)


@pytest.fixture(scope="module")
def directory(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wrong") / "model"


@pytest.fixture(scope="module")
def spoil(checkpoint: Path, directory: Path) -> Iterator[Callable[[str, bytes | str], None]]:
    """Makes the directory whole again but for one file."""

    def write(name: str, content: bytes | str) -> None:
        shutil.copytree(checkpoint, directory, dirs_exist_ok=True)
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        (directory / name).write_bytes(data)

    yield write
    shutil.rmtree(directory, ignore_errors=True)


def load_executor(directory: Path) -> None:
    load_model(directory, ModelConfig.from_directory(directory), torch.float32, CPU, pack=False)


def load_scheduler(directory: Path) -> None:
    fingerprint(directory)
    ModelSpec.from_directory(directory, "wrong")
    Tokenizer(directory)


def loads_or_is_refused(load: Callable[[Path], None], directory: Path) -> str:
    """Returns the message of a refusal, "" if there was none."""
    try:
        load(directory)
    except TYPED as error:
        message = str(error)
    else:
        return ""
    assert "\n" not in message.strip()
    assert 0 < len(message) < MAX_MESSAGE_CHARS
    return message


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("size", [2**24 + 1, 2**31 - 1, 2**31, 2**63, 10**400], ids=str)
def test_no_memory_is_taken_for_a_size_that_only_the_configuration_claims(
    checkpoint: Path, spoil, directory: Path, key: str, size: int
):
    spoil("config.json", (checkpoint / "config.json").read_bytes())
    with_value(directory / "config.json", key, size)
    assert loads_or_is_refused(load_executor, directory)


@settings(max_examples=150)
@given(rng=st.randoms(use_true_random=False), rope=st.sampled_from([None, *ROPES]))
def test_a_configuration_with_a_wrong_value_is_read_or_refused(
    checkpoint: Path, spoil, directory: Path, rng: random.Random, rope: dict[str, Any] | None
):
    config = json.loads((checkpoint / "config.json").read_text())
    if rope is not None:
        config["rope_parameters"] = {"rope_theta": 10_000.0, **rope}
    spoil("config.json", mutated_json(json.dumps(config), rng))
    loads_or_is_refused(load_executor, directory)
    loads_or_is_refused(load_scheduler, directory)


@settings(max_examples=60)
@given(rng=st.randoms(use_true_random=False))
def test_a_safetensors_header_with_a_wrong_value_is_read_or_refused(
    checkpoint: Path, spoil, directory: Path, rng: random.Random
):
    header, tensors = split_safetensors((checkpoint / "model.safetensors").read_bytes())
    spoil("model.safetensors", join_safetensors(mutated_json(json.dumps(header), rng), tensors))
    loads_or_is_refused(load_executor, directory)


@pytest.mark.parametrize("length", [0, 1, 2**31, 100_000_000, 2**63, 2**64 - 1])
def test_a_safetensors_file_that_lies_about_its_header_is_refused(
    checkpoint: Path, spoil, directory: Path, length: int
):
    header, tensors = split_safetensors((checkpoint / "model.safetensors").read_bytes())
    spoil("model.safetensors", join_safetensors(json.dumps(header), tensors, length))
    assert loads_or_is_refused(load_executor, directory)


def test_tensors_that_share_bytes_or_leave_the_file_are_refused(
    checkpoint: Path, spoil, directory: Path
):
    header, tensors = split_safetensors((checkpoint / "model.safetensors").read_bytes())
    first, second = sorted(header.keys() - {"__metadata__"})[:2]
    size = len(tensors)
    for offsets in ([0, 0], header[second]["data_offsets"], [size, 2 * size], [-4, 0], [8, 4]):
        wrong = header | {first: header[first] | {"data_offsets": offsets}}
        spoil("model.safetensors", join_safetensors(json.dumps(wrong), tensors))
        assert loads_or_is_refused(load_executor, directory), offsets


@settings(max_examples=40)
@given(
    rng=st.randoms(use_true_random=False),
    name=st.sampled_from(["tokenizer.json", "tokenizer_config.json", "generation_config.json"]),
)
def test_a_tokenizer_file_with_a_wrong_value_is_read_or_refused(
    checkpoint: Path, spoil, directory: Path, rng: random.Random, name: str
):
    spoil(name, mutated_json((checkpoint / name).read_text(), rng))
    loads_or_is_refused(load_scheduler, directory)


@pytest.mark.parametrize("content", ["", "{", "[]", "\0", nested(100_000), '{"a": ' + "1" * 5000])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_a_file_that_is_no_json_object_is_refused(spoil, directory: Path, name: str, content: str):
    spoil(name, content)
    assert loads_or_is_refused(load_scheduler, directory)


@pytest.mark.parametrize("content", ["", "{", "[]", nested(100_000), '{"a": ' + "1" * 5000 + "}"])
def test_a_shard_index_that_is_no_json_object_is_refused(spoil, directory: Path, content: str):
    spoil("model.safetensors.index.json", content)
    (directory / "model.safetensors").unlink()
    assert loads_or_is_refused(load_executor, directory)


def test_every_kind_of_value_is_tried():
    kinds = {type(value) for value in JSON_VALUES}
    assert kinds == {type(None), bool, int, float, str, list, dict}
