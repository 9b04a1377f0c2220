"""top_k, top_p and min_p as one threshold per row, so that masking is a single comparison."""

import torch
from torch import Tensor

# On a CPU, candidates that are selected before a whole row is sorted: a nucleus is rarely larger,
# and selecting 2048 of 49,152 takes a sixth of the time that sorting them does.
_NUM_CANDIDATES = 2048


def keep_threshold(
    logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, *, max_top_k: int = 0
) -> Tensor:
    """The smallest logit that may be chosen.

    The rules are those of transformers' TopK, TopP and MinP warpers applied in this order. Tokens
    whose logit equals the threshold are all kept: which of them a sort would put first has no
    meaning.

    Args:
        logits: [rows, vocab_size] float32 after temperature, each row's maximum at 0.
        top_k: [rows]; 0 and less, or vocab_size and more, keeps all.
        top_p: [rows]; 1 keeps all.
        min_p: [rows]; 0 keeps all.
        max_top_k: largest top_k, if every row with top_k or top_p has one; 0 if not known.

    Returns:
        [rows] float32; minus infinity in rows that keep all.
    """
    vocab_size = logits.shape[1]
    top_k = torch.where((top_k <= 0) | (top_k > vocab_size), vocab_size, top_k)
    if logits.device.type == "cpu":
        threshold = _threshold_cpu(logits, top_k, top_p)
    else:
        num_candidates = max_top_k if 0 < max_top_k < vocab_size else vocab_size
        threshold, _ = sorted_threshold(logits, top_k, top_p, num_candidates)
    # Relative to the most probable token, whose logit is 0.
    return torch.maximum(threshold, min_p.log())


def _threshold_cpu(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Like `sorted_threshold`, but spends time only on rows that need it."""
    vocab_size = logits.shape[1]
    threshold = logits.new_full((logits.shape[0],), float("-inf"))
    rows = ((top_k < vocab_size) | (top_p < 1)).nonzero().squeeze(1)
    for num_candidates in (min(_NUM_CANDIDATES, vocab_size), vocab_size):
        if rows.numel() == 0:
            break
        found, is_exact = sorted_threshold(logits[rows], top_k[rows], top_p[rows], num_candidates)
        threshold[rows] = found
        rows = rows[~is_exact]
    return threshold


def sorted_threshold(
    logits: Tensor, top_k: Tensor, top_p: Tensor, num_candidates: int
) -> tuple[Tensor, Tensor]:
    """Thresholds of top_k and top_p, from the `num_candidates` largest logits of each row.

    Returns:
        The thresholds [rows], and whether the candidates were enough [rows]: they always are where
        top_k is at most their number.
    """
    vocab_size = logits.shape[1]
    candidates = logits.topk(num_candidates, dim=-1).values
    last_kept = (top_k.clamp(max=num_candidates) - 1).long()[:, None]
    k_threshold = candidates.gather(1, last_kept).squeeze(1)
    has_top_k = top_k < vocab_size
    k_threshold = torch.where(has_top_k, k_threshold, float("-inf"))

    # Masses relative to the most probable token, whose logit is 0.
    is_kept = candidates >= k_threshold[:, None]
    masses = torch.where(is_kept, candidates.exp(), 0.0)
    total = torch.where(has_top_k, masses.sum(dim=-1), logits.exp().sum(dim=-1))
    cumulative = masses.cumsum(dim=-1)
    # A token stays while the mass of those before it has not reached top_p.
    in_nucleus = is_kept & (cumulative - masses < (top_p * total)[:, None])
    nucleus_threshold = candidates.masked_fill(~in_nucleus, float("inf")).amin(dim=-1)
    has_top_p = top_p < 1
    threshold = torch.where(has_top_p, nucleus_threshold, k_threshold)

    k_is_exact = top_k <= num_candidates
    p_is_exact = ~has_top_k & (cumulative[:, -1] >= top_p * total)
    return threshold, k_is_exact | p_is_exact
