from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from nanovllm_core.config import ModelConfig
from nanovllm_core.rope import RotaryEmbedding, rotate
from tests.checkpoints import make_checkpoint
from tests.core.rope_kinds import ROPE_KINDS


@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_tables_equal_those_of_transformers(tmp_path: Path, kind: str) -> None:
    directory = make_checkpoint(tmp_path, "llama", rope_scaling=ROPE_KINDS[kind])
    ours = RotaryEmbedding(ModelConfig.from_directory(directory), torch.device("cpu"))
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(directory))
    positions = torch.arange(512)
    cos, sin = theirs(torch.zeros(1), positions[None])
    torch.testing.assert_close(ours.cos, cos[0, :, :16], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.sin, sin[0, :, :16], rtol=1e-6, atol=1e-6)


def test_kinds_differ_from_one_another(tmp_path: Path) -> None:
    tables = []
    for kind, scaling in ROPE_KINDS.items():
        directory = make_checkpoint(tmp_path / kind, "llama", rope_scaling=scaling)
        tables.append(
            RotaryEmbedding(ModelConfig.from_directory(directory), torch.device("cpu")).cos
        )
    for index, table in enumerate(tables):
        for other in tables[:index]:
            assert (table - other).abs().max() > 0.01


def test_rotation_equals_that_of_transformers(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "llama")
    rotary = RotaryEmbedding(ModelConfig.from_directory(directory), torch.device("cpu"))
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(directory))
    positions = torch.tensor([0, 7, 200, 511, 3])
    heads = torch.randn(5, 6, 32, generator=torch.Generator().manual_seed(0))
    expected, _ = apply_rotary_pos_emb(
        heads.transpose(0, 1)[None],
        heads.transpose(0, 1)[None],
        *theirs(heads, positions[None]),
    )
    actual = rotate(heads, *rotary(positions))
    torch.testing.assert_close(actual, expected[0].transpose(0, 1), rtol=1e-6, atol=1e-6)
