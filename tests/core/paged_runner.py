"""Runs a model over paged sequences as an executor would, with shuffled blocks."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nanovllm_core.attention import create_backend
from nanovllm_core.batch import ForwardBatch
from nanovllm_core.config import ModelConfig
from nanovllm_core.kv_cache import KVCache
from nanovllm_core.loader import load_model

CPU = torch.device("cpu")


@dataclass(eq=False)
class Sequence:
    """Known tokens and where their KV is."""

    token_ids: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)


class PagedRunner:
    """One model with its cache."""

    def __init__(
        self,
        directory: Path,
        *,
        dtype: torch.dtype = torch.float32,
        num_blocks: int = 96,
        block_size: int = 4,
        seed: int = 0,
    ) -> None:
        self.config = ModelConfig.from_directory(directory)
        self.model = load_model(directory, self.config, dtype, CPU)
        self.cache = KVCache(self.config, num_blocks, block_size, dtype, CPU)
        self.attention = create_backend("torch", self.config, CPU)
        self.free_blocks = list(range(num_blocks))
        random.Random(seed).shuffle(self.free_blocks)

    def run(self, work: list[tuple[Sequence, int]], *, num_padded: int = 0) -> list[Tensor]:
        """One iteration: the next tokens of some sequences, prefill chunks before decode rows.

        A single token that is the last known one is a decode row, unless nothing was computed
        before. Returns each sequence's logits, [its tokens, vocab_size], in the order of `work`.
        """
        prefill = [(seq, count) for seq, count in work if not _is_decode(seq, count)]
        decode = [(seq, count) for seq, count in work if _is_decode(seq, count)]
        ordered = prefill + decode
        batch = self._batch(ordered, len(prefill), num_padded)
        hidden = self.model(batch, self.cache, self.attention)
        logits = self.model.logits(hidden[batch.logits_rows])
        per_sequence = dict(
            zip(
                [id(seq) for seq, _ in ordered],
                logits.split([count for _, count in ordered]),
                strict=True,
            )
        )
        for seq, count in ordered:
            seq.num_computed += count
        return [per_sequence[id(seq)] for seq, _ in work]

    def generate(self, prompt: list[int], num_tokens: int, chunk: int | None = None) -> list[int]:
        """Greedy tokens of one sequence alone; the prompt in chunks of `chunk` tokens."""
        seq = Sequence(list(prompt))
        while len(seq.token_ids) < len(prompt) + num_tokens:
            remaining = len(seq.token_ids) - seq.num_computed
            logits = self.run([(seq, min(chunk or remaining, remaining))])[0]
            if seq.num_computed == len(seq.token_ids):
                seq.token_ids.append(int(logits[-1].argmax()))
        return seq.token_ids[len(prompt) :]

    def _batch(
        self, ordered: list[tuple[Sequence, int]], num_prefill: int, num_padded: int
    ) -> ForwardBatch:
        block_size = self.cache.block_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        contexts: list[int] = []
        for seq, count in ordered:
            context = seq.num_computed + count
            while len(seq.blocks) * block_size < context:
                seq.blocks.append(self.free_blocks.pop())
            contexts.append(context)
            for position in range(seq.num_computed, context):
                token_ids.append(seq.token_ids[position])
                positions.append(position)
                slots.append(
                    seq.blocks[position // block_size] * block_size + position % block_size
                )
        num_logits = len(token_ids)
        token_ids += [0] * num_padded
        positions += [0] * num_padded
        slots += [self.cache.trash_slot] * num_padded
        tables = torch.full(
            (len(ordered) + num_padded, max(len(seq.blocks) for seq, _ in ordered) + 2),
            self.cache.num_blocks,
            dtype=torch.int32,
        )
        for row, (seq, _) in enumerate(ordered):
            tables[row, : len(seq.blocks)] = torch.tensor(seq.blocks, dtype=torch.int32)
        return ForwardBatch(
            token_ids=torch.tensor(token_ids, dtype=torch.int32),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            block_tables=tables,
            context_lens=torch.tensor(contexts + [0] * num_padded, dtype=torch.int32),
            prefill_lens=[count for _, count in ordered[:num_prefill]],
            prefill_context_lens=contexts[:num_prefill],
            max_decode_context_len=max(contexts[num_prefill:], default=0),
            logits_rows=torch.arange(num_logits),
        )


def _is_decode(seq: Sequence, count: int) -> bool:
    return count == 1 and 0 < seq.num_computed == len(seq.token_ids) - 1
