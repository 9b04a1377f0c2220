"""Changes to single logits, in place, for all rows at once.

A history is [rows, max_len] token ids rather than a [rows, vocab_size] matrix of counts, so each
change is a gather and a scatter. Two rules keep that exact: entries that count for nothing add
zero, or they repeat what a counting entry of the same row writes, so that it does not matter which
of several writes to one logit comes last.
"""

import torch
from torch import Tensor


def add_bias(logits: Tensor, token_ids: Tensor, values: Tensor) -> None:
    """Adds `values` [rows, n] to the logits of `token_ids` [rows, n] (-1: none)."""
    is_set = token_ids >= 0
    logits.scatter_add_(1, token_ids.clamp(min=0).long(), torch.where(is_set, values, 0.0))


def mask_stop_tokens(logits: Tensor, token_ids: Tensor, active: Tensor) -> None:
    """Rules out `token_ids` [rows, n] (-1: none) in the rows where `active` [rows] holds."""
    is_set = (token_ids >= 0) & active[:, None]
    penalty = torch.zeros(token_ids.shape, dtype=logits.dtype, device=logits.device)
    penalty.masked_fill_(is_set, float("-inf"))
    logits.scatter_add_(1, token_ids.clamp(min=0).long(), penalty)


def apply_penalties(
    logits: Tensor,
    *,
    token_ids: Tensor,
    num_prompt_tokens: Tensor,
    num_tokens: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """Penalises tokens that occurred before.

    Args:
        logits: [rows, vocab_size] float32.
        token_ids: [rows, max_len], prompt and output, valid up to num_tokens.
        num_prompt_tokens: [rows].
        num_tokens: [rows], at least 1.
        repetition: [rows]; divides positive and multiplies negative logits of tokens in prompt or
            output (CTRL, arXiv:1909.05858, as in transformers).
        frequency: [rows]; subtracted once per occurrence in the output.
        presence: [rows]; subtracted once from every token in the output.
    """
    index = torch.arange(token_ids.shape[1], device=logits.device)
    is_valid = index < num_tokens[:, None]
    is_output = is_valid & (index >= num_prompt_tokens[:, None])
    # What stands behind the history may be anything; the first token is always valid.
    first = token_ids[:, :1]
    known = torch.where(is_valid, token_ids, first).long()

    values = logits.gather(1, known)
    factor = repetition[:, None]
    logits.scatter_(1, known, torch.where(values > 0, values / factor, values * factor))

    logits.scatter_add_(1, known, torch.where(is_output, -frequency[:, None], 0.0))

    # Without any output yet, the first token is written back unchanged.
    has_output = (num_tokens > num_prompt_tokens)[:, None]
    last_index = (num_tokens - 1).clamp(min=0).long()[:, None]
    anchor = torch.where(has_output, token_ids.gather(1, last_index), first)
    generated = torch.where(is_output, token_ids, anchor).long()
    subtracted = torch.where(has_output, presence[:, None], 0.0)
    logits.scatter_(1, generated, logits.gather(1, generated) - subtracted)
