"""What one iteration of the model runs on."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ChunkIndex:
    """Where prefill chunks lie, on the device, for a batch whose chunks the host does not know."""

    # [num_chunks + 1] int32, first token of each chunk and the end of the last
    query_start: Tensor
    # [num_tiles, 2] int32, see `paged_prefill.list_tiles`
    tiles: Tensor


@dataclass(slots=True)
class ForwardBatch:
    """The tokens of one iteration, flat, with the sequences that they belong to.

    Sequences are ordered: prefill chunks first, then decode rows of one token each. Device tensors
    describe every sequence; the host fields exist so that no kernel launch has to wait for a value
    from the device.
    """

    # [num_tokens] int32 or int64
    token_ids: Tensor
    # [num_tokens] int64, index of each token in its sequence
    positions: Tensor
    # [num_tokens] int64, flat cache slot (block * block_size + offset) that takes the token's KV
    slot_mapping: Tensor
    # [num_seqs, max_blocks_per_seq] int32; entries behind a sequence's context are any block ids
    # of the pool: they may be read, and what is read is masked
    block_tables: Tensor
    # [num_seqs] int32, tokens in the cache including this iteration's; 0 in rows that only pad
    context_lens: Tensor
    # query tokens of each prefill chunk, in order
    prefill_lens: list[int]
    # context_lens of the prefill chunks
    prefill_context_lens: list[int]
    # upper bound of context_lens over the decode rows; 0 if there are none
    max_decode_context_len: int
    # [num_logits] int64, rows of the hidden states from which a token is sampled
    logits_rows: Tensor
    # of batches that are captured in a graph; prefill_lens then only gives the numbers of chunks
    # and, in sum, of tokens
    chunk_index: ChunkIndex | None = None

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens in prefill chunks; they come first."""
        return sum(self.prefill_lens)

    @property
    def num_prefill_seqs(self) -> int:
        """Number of prefill chunks."""
        return len(self.prefill_lens)

    @property
    def num_decode_seqs(self) -> int:
        """Number of decode rows, padding included."""
        return self.block_tables.shape[0] - len(self.prefill_lens)
