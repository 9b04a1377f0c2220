"""Chooses one token per row of logits, and reports log-probabilities."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm_core.logit_filters import keep_threshold
from nanovllm_core.logit_penalties import add_bias, apply_penalties, mask_stop_tokens
from nanovllm_core.random import exponential_noise


@dataclass(slots=True)
class SamplingBatch:
    """Sampling state of the rows that get a token.

    Tensors live on the logits' device. The host flags say which passes at least one row needs; a
    pass that runs for the sake of one row leaves the others as they are.
    """

    # [rows] float32; 0 means greedy
    temperature: Tensor
    # [rows] float32 in (0, 1]; 1 keeps all
    top_p: Tensor
    # [rows] float32 in [0, 1]; 0 keeps all
    min_p: Tensor
    # [rows] int32; 0 and less, or vocab_size and more, keeps all
    top_k: Tensor
    # [rows] int64, key of the random generator
    seeds: Tensor
    # [rows] int64, index that the new token will have in its sequence: the generator's counter
    positions: Tensor
    # [rows] float32; 0 is off
    presence_penalty: Tensor
    # [rows] float32; 0 is off
    frequency_penalty: Tensor
    # [rows] float32, positive; 1 is off
    repetition_penalty: Tensor
    # [rows, max_len] int32, prompt and output; valid up to num_tokens, which is at least 1
    token_ids: Tensor
    # [rows] integer, how many of the tokens are prompt
    num_prompt_tokens: Tensor
    # [rows] integer
    num_tokens: Tensor
    # [rows, max_bias] int32, padded with -1; no id twice in a row
    bias_token_ids: Tensor
    # [rows, max_bias] float32
    bias_values: Tensor
    # [rows, max_stop] int32, padded with -1
    stop_token_ids: Tensor
    # [rows] integer; stop tokens cannot be chosen while num_tokens is below it
    min_total_tokens: Tensor

    # a row has a temperature above 0
    any_random: bool
    # a row with a temperature has top_k, top_p or min_p
    any_filter: bool
    # a row has a presence, frequency or repetition penalty
    any_penalty: bool
    # a row has a bias
    any_bias: bool
    # a row is below its min_total_tokens
    any_min_tokens: bool
    # number of most probable tokens to report; 0: only the chosen one's log-probability; -1: none
    max_logprobs: int
    # Largest top_k, if every row with top_k or top_p has a top_k; 0 if that is not so or not known.
    # On a GPU it decides whether selecting that many is enough or whole rows must be sorted.
    max_top_k: int = 0


@dataclass(slots=True)
class SampledTokens:
    """The tokens, and log-probabilities where asked for (under the untouched logits)."""

    # [rows] int32
    token_ids: Tensor
    # [rows] float32
    chosen_logprobs: Tensor | None
    # [rows, max_logprobs] int32, most probable first
    top_token_ids: Tensor | None
    # [rows, max_logprobs] float32
    top_logprobs: Tensor | None


@torch.inference_mode()
def sample(logits: Tensor, batch: SamplingBatch) -> SampledTokens:
    """Samples one token per row.

    The order is: logit bias, repetition penalty, frequency penalty, presence penalty, minimum
    length, temperature, top_k, top_p within the top_k set, min_p. A row's result depends on that
    row alone, not on its place in the batch. On a GPU nothing here waits for the device.

    Args:
        logits: [rows, vocab_size] float32; modified in place.
        batch: the rows' state.

    Returns:
        The tokens. Greedy rows take the lowest id among equals.
    """
    # The log-probabilities are those of the model itself, so they are taken before all changes.
    raw = logits.clone() if batch.max_logprobs >= 0 else None
    if batch.any_bias:
        add_bias(logits, batch.bias_token_ids, batch.bias_values)
    if batch.any_penalty:
        apply_penalties(
            logits,
            token_ids=batch.token_ids,
            num_prompt_tokens=batch.num_prompt_tokens,
            num_tokens=batch.num_tokens,
            repetition=batch.repetition_penalty,
            frequency=batch.frequency_penalty,
            presence=batch.presence_penalty,
        )
    if batch.any_min_tokens:
        is_short = batch.num_tokens < batch.min_total_tokens
        mask_stop_tokens(logits, batch.stop_token_ids, is_short)
    token_ids = logits.argmax(dim=-1)
    if batch.any_random:
        token_ids = torch.where(batch.temperature > 0, _draw(logits, token_ids, batch), token_ids)
    return _with_logprobs(token_ids, raw, batch.max_logprobs)


def _draw(logits: Tensor, greedy: Tensor, batch: SamplingBatch) -> Tensor:
    """[rows] int64: a draw from softmax(logits / temperature) after the filters.

    Rows with temperature 0 come out meaningless.
    """
    if logits.is_cuda:
        return _draw_on_gpu(logits, batch)
    temperature = torch.where(batch.temperature > 0, batch.temperature, 1.0)
    # With the maximum at 0 no temperature, however small, can overflow.
    logits.sub_(logits.gather(1, greedy[:, None])).div_(temperature[:, None])
    if batch.any_filter:
        threshold = keep_threshold(
            logits, batch.top_k, batch.top_p, batch.min_p, max_top_k=batch.max_top_k
        )
        logits.masked_fill_(logits < threshold[:, None], float("-inf"))
    # The winner of an exponential race, argmax p / e, in the logarithm.
    noise = exponential_noise(batch.seeds, batch.positions, logits.shape[1])
    return logits.sub_(noise.log_()).argmax(dim=-1)


def _draw_on_gpu(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """`_draw` without sorting, in two passes over the logits and at most four more for filters."""
    from nanovllm_core.kernels.filter_threshold import filter_thresholds
    from nanovllm_core.kernels.sampling import sample_tokens

    threshold = None
    if batch.any_filter:
        threshold = filter_thresholds(
            logits,
            batch.temperature,
            batch.top_k,
            batch.top_p,
            batch.min_p,
            max_top_k=batch.max_top_k,
        )
    return sample_tokens(
        logits, batch.temperature, batch.seeds, batch.positions, threshold=threshold
    ).to(torch.int64)


def _with_logprobs(token_ids: Tensor, raw: Tensor | None, max_logprobs: int) -> SampledTokens:
    if raw is None:
        return SampledTokens(token_ids.to(torch.int32), None, None, None)
    log_total = raw.logsumexp(dim=-1, keepdim=True)
    top = raw.topk(min(max_logprobs, raw.shape[1]), dim=-1)
    return SampledTokens(
        token_ids=token_ids.to(torch.int32),
        chosen_logprobs=(raw.gather(1, token_ids[:, None]) - log_total).squeeze(1),
        top_token_ids=top.indices.to(torch.int32),
        top_logprobs=top.values - log_total,
    )
