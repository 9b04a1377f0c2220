"""What the paged cache and the attention backends promise beside the numbers."""

from pathlib import Path

import pytest
import torch

from nanovllm_core.attention import BackendError, backend_names, create_backend
from nanovllm_core.batch import ForwardBatch
from nanovllm_core.config import ModelConfig
from nanovllm_core.kv_cache import KVCache
from nanovllm_core.model import CausalLM
from nanovllm_core.sampler import sample
from tests.checkpoints import make_checkpoint
from tests.core.paged_runner import CPU, PagedRunner, Sequence
from tests.core.sampling_rows import make_batch


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3")


def test_unknown_backend_is_refused_with_the_known_names(directory: Path) -> None:
    with pytest.raises(BackendError, match=r"'cudnn'; choose one of .*torch"):
        create_backend("cudnn", ModelConfig.from_directory(directory), CPU)


def test_the_torch_backend_is_known_by_its_name(directory: Path) -> None:
    assert "torch" in backend_names()
    assert create_backend("torch", ModelConfig.from_directory(directory), CPU).name == "torch"


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0)])
def test_an_empty_pool_is_refused(directory: Path, num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        KVCache(ModelConfig.from_directory(directory), num_blocks, block_size, torch.float32, CPU)


def test_bytes_per_block_is_what_the_pool_takes(directory: Path) -> None:
    config = ModelConfig.from_directory(directory)
    pool = KVCache(config, 7, 16, torch.bfloat16, CPU)
    per_block = KVCache.bytes_per_block(config, 16, torch.bfloat16)
    assert pool.key.nbytes + pool.value.nbytes == 8 * per_block
    assert pool.trash_slot == 7 * 16


def test_written_tokens_stand_in_their_slots_of_one_layer(directory: Path) -> None:
    pool = KVCache(ModelConfig.from_directory(directory), 3, 4, torch.float32, CPU)
    key, value = torch.randn(2, 2, 2, 32).unbind(0)
    pool.write(1, key, value, torch.tensor([6, pool.trash_slot]))
    assert torch.equal(pool.key[1, 1, 2], key[0])
    assert torch.equal(pool.value[1, 1, 2], value[0])
    assert torch.equal(pool.key[1, 3, 0], key[1])
    assert pool.key.count_nonzero() == key.numel()


def test_other_blocks_and_stale_tails_carry_no_weight(directory: Path) -> None:
    prompt = list(range(30, 51))

    def logits_over(garbage: float) -> torch.Tensor:
        runner = PagedRunner(directory)
        runner.cache.key.fill_(garbage)
        runner.cache.value.fill_(garbage)
        sequence = Sequence(prompt)
        parts = runner.run([(sequence, 9)]) + runner.run([(sequence, 11)])
        return torch.cat(parts + runner.run([(sequence, 1)], num_padded=2))

    assert torch.equal(logits_over(0.0), logits_over(1e4))


def test_padded_rows_stay_finite(directory: Path) -> None:
    runner = PagedRunner(directory)
    sequence = Sequence([1, 2, 3])
    runner.run([(sequence, 3)])
    sequence.token_ids.append(4)
    runner.run([(sequence, 1)], num_padded=3)
    assert runner.cache.key[:, -1].isfinite().all()
    assert runner.cache.value[:, -1].isfinite().all()
    assert runner.cache.key[:, -1].count_nonzero() > 0


def test_rows_do_not_depend_on_their_neighbours(directory: Path) -> None:
    def decode(lengths: list[int]) -> torch.Tensor:
        runner = PagedRunner(directory)
        sequences = [Sequence(list(range(length))) for length in lengths]
        for seq in sequences:
            runner.run([(seq, len(seq.token_ids))])
            seq.token_ids.append(9)
        return runner.run([(seq, 1) for seq in sequences])[0]

    torch.testing.assert_close(decode([17]), decode([17, 50, 2]), rtol=1e-4, atol=1e-4)


def test_a_decode_iteration_needs_no_value_from_the_device(directory: Path) -> None:
    # On the meta device every read of a value raises, as every such read would make the host wait
    # for a GPU and could not be captured in a CUDA graph.
    meta = torch.device("meta")
    config = ModelConfig.from_directory(directory)
    model = CausalLM(config, torch.float32, meta)
    pool = KVCache(config, 8, 4, torch.float32, meta)
    rows = 3
    with meta:
        batch = ForwardBatch(
            token_ids=torch.zeros(rows, dtype=torch.int32),
            positions=torch.zeros(rows, dtype=torch.int64),
            slot_mapping=torch.zeros(rows, dtype=torch.int64),
            block_tables=torch.zeros((rows, 6), dtype=torch.int32),
            context_lens=torch.ones(rows, dtype=torch.int32),
            prefill_lens=[],
            prefill_context_lens=[],
            max_decode_context_len=21,
            logits_rows=torch.zeros(rows, dtype=torch.int64),
        )
    hidden = model(batch, pool, create_backend("torch", config, meta))
    logits = model.logits(hidden[batch.logits_rows])
    sampled = sample(logits, make_batch(rows, device=meta, everything=True))
    assert sampled.token_ids.shape == (rows,)
    assert sampled.token_ids.dtype == torch.int32
