import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm_core.config import ModelConfig
from nanovllm_core.loader import CheckpointError, load_model
from nanovllm_core.model import CausalLM
from tests.checkpoints import make_checkpoint

CPU = torch.device("cpu")


def load(directory: Path, on_progress: Callable[[int, int], None] | None = None) -> CausalLM:
    config = ModelConfig.from_directory(directory)
    return load_model(directory, config, torch.float32, CPU, on_progress)


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_index(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, "llama")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, "llama", shard=True)


def test_shards_load_like_a_single_file(tmp_path: Path) -> None:
    token = torch.tensor([[5.0]]).expand(1, 64)
    models = [
        load(make_checkpoint(tmp_path / str(shard), "qwen3", tied=False, shard=shard))
        for shard in (False, True)
    ]
    assert not (tmp_path / "True" / "model.safetensors").exists()
    first, second = (model.logits(model.norm(token)) for model in models)
    assert torch.equal(first, second)
    assert torch.equal(models[0].embedding, models[1].embedding)


def test_progress_grows_to_the_total(single: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(single, lambda done, total: seen.append((done, total)))
    expected = sum(tensor.nbytes for tensor in load_file(single / "model.safetensors").values())
    done = [value for value, _ in seen]
    assert {total for _, total in seen} == {expected}
    assert done == sorted(set(done))
    assert done[-1] == expected


def test_weights_are_converted_to_the_wanted_dtype(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "llama", dtype="bfloat16")
    model = load(directory)
    assert model.embedding.dtype == torch.float32
    stored = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.embedding, stored.float())


def test_missing_tensors_are_named(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.* missing"):
        load(single)


def test_missing_output_matrix_of_an_untied_model_is_named(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "llama", tied=False)
    rewrite(directory, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.* missing"):
        load(directory)


def test_many_missing_tensors_are_counted(single: Path) -> None:
    rewrite(single, lambda tensors: [tensors.pop(name) for name in list(tensors)[:12]])
    with pytest.raises(CheckpointError, match=r"12 tensor\(s\) .* and 4 more"):
        load(single)


def test_unexpected_tensors_are_named(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.update({"model.extra": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"model\.extra.* unexpected"):
        load(single)


def test_a_bias_that_the_configuration_denies_is_unexpected(single: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(single, lambda tensors: tensors.update({name: torch.zeros(128)}))
    with pytest.raises(CheckpointError, match=r"q_proj\.bias.* unexpected"):
        load(single)


def test_misshapen_tensors_are_named_with_both_shapes(single: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(single, lambda tensors: tensors.update({name: torch.zeros(32, 64)}))
    with pytest.raises(CheckpointError, match=r"k_proj\.weight is \[32, 64\] and must be \[64, 64"):
        load(single)


def test_integer_tensors_are_refused(single: Path) -> None:
    name = "model.norm.weight"
    rewrite(single, lambda tensors: tensors.update({name: torch.zeros(64, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has dtype I8"):
        load(single)


def test_old_rotary_buffers_are_ignored(single: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(single, lambda tensors: tensors.update({name: torch.zeros(16)}))
    load(single)


def test_an_equal_output_matrix_of_a_tied_model_is_ignored(single: Path) -> None:
    rewrite(
        single,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        ),
    )
    load(single)


def test_a_different_output_matrix_of_a_tied_model_is_refused(single: Path) -> None:
    rewrite(
        single,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
        ),
    )
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false"):
        load(single)


def test_truncated_file_is_refused(single: Path) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a complete"):
        load(single)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_malformed_file_is_refused(single: Path, content: bytes) -> None:
    (single / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a complete"):
        load(single)


def test_directory_without_safetensors_is_refused(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors checkpoints can be loaded"):
        load(single)


def test_shard_index_naming_a_missing_file_is_refused(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"missing files: {shard.name}"):
        load(sharded)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/tmp/x.safetensors", "sub/x", 7])
def test_shard_index_that_leaves_the_directory_is_refused(sharded: Path, file: object) -> None:
    edit_index(sharded, lambda names: names.update({"model.norm.weight": file}))  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match="must be a plain file name"):
        load(sharded)


def test_shard_index_that_names_the_wrong_shard_is_refused(sharded: Path) -> None:
    def swap(names: dict[str, str]) -> None:
        other = next(f for f in names.values() if f != names["model.norm.weight"])
        names["model.norm.weight"] = other

    edit_index(sharded, swap)
    with pytest.raises(CheckpointError, match=r"says that model\.norm\.weight is in"):
        load(sharded)


def test_tensor_that_the_index_omits_is_refused(sharded: Path) -> None:
    edit_index(sharded, lambda names: names.pop("model.layers.0.mlp.down_proj.weight"))
    with pytest.raises(CheckpointError, match=r"does not list model\.layers\.0\.mlp\.down_proj"):
        load(sharded)


def test_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    tensors = load_file(first) | load_file(second)
    save_file(tensors, second)
    with pytest.raises(CheckpointError, match=f"is in both {first.name} and {second.name}"):
        load(sharded)


def test_index_that_names_a_tensor_twice_is_refused(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    entry = '"model.norm.weight": '
    path.write_text(path.read_text().replace(entry, entry + '"other", ' + entry, 1))
    with pytest.raises(CheckpointError, match=r"names model\.norm\.weight twice"):
        load(sharded)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_malformed_index_is_refused(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load(sharded)


def test_checkpoint_of_another_depth_is_refused(single: Path) -> None:
    path = single / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\..* unexpected"):
        load(single)
