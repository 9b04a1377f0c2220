"""From settings to an engine, or to one line that says what to change."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from executor_service.engine_factory import create_engine
from executor_service.settings import ExecutorSettings
from nanovllm.service_settings import StartupError
from nanovllm_core.config import ModelConfig
from nanovllm_core.kv_cache import KVCache
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("factory") / "tiny", dtype="bfloat16")


def settings(directory: Path, *arguments: str) -> ExecutorSettings:
    return ExecutorSettings.from_arguments(
        ["--model", str(directory), "--device", "cpu", *arguments]
    )


def test_unset_sizes_come_from_the_model_and_cover_every_slot(checkpoint: Path):
    engine = create_engine(checkpoint, settings(checkpoint, "--max-num-seqs", "3"))
    limits = engine.limits
    assert (engine.dtype_name, engine.device_name) == ("bfloat16", "cpu")
    assert limits.max_model_len == 512
    # A tiny model's cache fits; more than all slots can use would be waste.
    assert limits.num_blocks == 3 * limits.max_blocks_per_seq
    assert engine.state.token_ids.shape == (4, 513)


def test_settings_override_the_model(checkpoint: Path):
    engine = create_engine(
        checkpoint,
        settings(
            checkpoint,
            *("--dtype", "float32", "--block-size", "8", "--num-kv-blocks", "11"),
            *("--max-model-len", "100", "--max-num-seqs", "2", "--max-num-batched-tokens", "9"),
        ),
    )
    limits = engine.limits
    assert engine.dtype_name == "float32"
    assert (limits.block_size, limits.num_blocks, limits.max_model_len) == (8, 11, 100)
    assert limits.max_num_batched_tokens == 9
    assert limits.max_blocks_per_seq == 13


def test_many_slots_raise_the_default_token_budget_above_them(checkpoint: Path):
    engine = create_engine(
        checkpoint, settings(checkpoint, "--max-num-seqs", "600", "--max-model-len", "16")
    )
    assert engine.limits.max_num_batched_tokens > 600


def test_the_cpu_cache_is_bounded_by_its_budget(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    config = ModelConfig.from_directory(checkpoint)
    block_bytes = KVCache.bytes_per_block(config, 16, torch.bfloat16)
    monkeypatch.setattr("executor_service.engine_factory._CPU_KV_BYTES", 50 * block_bytes)
    engine = create_engine(checkpoint, settings(checkpoint, "--block-size", "16"))
    # One of the fifty is the trash block.
    assert engine.limits.num_blocks == 49
    assert engine.limits.num_blocks < 256 * engine.limits.max_blocks_per_seq


def test_a_cache_that_holds_no_sequence_is_refused_with_its_size(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("executor_service.engine_factory._memory_bytes", lambda: 2)
    with pytest.raises(StartupError, match="lower --max-model-len"):
        create_engine(checkpoint, settings(checkpoint))


def test_one_long_sequence_may_take_more_than_the_cpu_budget(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("executor_service.engine_factory._CPU_KV_BYTES", 1)
    engine = create_engine(checkpoint, settings(checkpoint))
    assert engine.limits.num_blocks == engine.limits.max_blocks_per_seq


def test_a_cache_beyond_all_memory_is_refused_in_one_line(checkpoint: Path):
    with pytest.raises(StartupError, match="do not fit into memory") as error:
        create_engine(checkpoint, settings(checkpoint, "--num-kv-blocks", "1000000000"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--max-model-len", "513"], "--max-model-len 513 exceeds the model's 512"),
        (["--max-num-batched-tokens", "4", "--max-num-seqs", "4"], "prefill would never"),
        (["--attention-backend", "flash_attn"], "--attention-backend"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(
    checkpoint: Path, arguments: list[str], problem: str
):
    with pytest.raises(StartupError, match=problem):
        create_engine(checkpoint, settings(checkpoint, *arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(checkpoint: Path):
    arguments = ["--model", str(checkpoint), "--device", "cuda"]
    with pytest.raises(StartupError, match="use --device cpu"):
        create_engine(checkpoint, ExecutorSettings.from_arguments(arguments))


def test_a_broken_checkpoint_is_an_error_of_the_model_setting(checkpoint: Path, tmp_path: Path):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(StartupError, match=r"--model .*broken"):
        create_engine(broken, settings(broken))
    config = json.loads((broken / "config.json").read_text())
    config["architectures"] = ["SomethingElse"]
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError, match="SomethingElse"):
        create_engine(broken, settings(broken))
