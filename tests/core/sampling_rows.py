"""Sampling batches with every feature off, to switch single ones on."""

from typing import Any

import torch

from nanovllm_core.sampler import SamplingBatch


def make_batch(
    rows: int,
    *,
    device: torch.device | None = None,
    everything: bool = False,
    **fields: Any,
) -> SamplingBatch:
    """A batch of greedy rows without any history but one token.

    Args:
        rows: number of rows.
        device: where the tensors live; the CPU by default.
        everything: sets all host flags, so that every pass runs.
        fields: fields to replace; a scalar or list becomes a tensor of the field's dtype.
    """
    float_fields = {
        "temperature": 0.0,
        "top_p": 1.0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
    }
    int_fields = {"top_k": 0, "num_prompt_tokens": 1, "num_tokens": 1, "min_total_tokens": 0}
    values: dict[str, Any] = {
        name: torch.full((rows,), value) for name, value in float_fields.items()
    }
    values |= {
        name: torch.full((rows,), value, dtype=torch.int32) for name, value in int_fields.items()
    }
    values |= {
        "seeds": torch.arange(rows),
        "positions": torch.zeros(rows, dtype=torch.int64),
        "token_ids": torch.zeros((rows, 1), dtype=torch.int32),
        "bias_token_ids": torch.full((rows, 1), -1, dtype=torch.int32),
        "bias_values": torch.zeros((rows, 1)),
        "stop_token_ids": torch.full((rows, 1), -1, dtype=torch.int32),
    }
    flags: dict[str, Any] = dict.fromkeys(
        ("any_random", "any_filter", "any_penalty", "any_bias", "any_min_tokens"), everything
    )
    flags |= {"max_logprobs": 3 if everything else -1, "max_top_k": 0}
    for name, value in fields.items():
        if name in flags:
            flags[name] = value
        elif isinstance(value, torch.Tensor):
            values[name] = value
        else:
            like = values[name]
            tensor = torch.tensor(value, dtype=like.dtype)
            values[name] = tensor.expand(like.shape).clone() if tensor.dim() == 0 else tensor
    return SamplingBatch(
        **{name: value.to(device or torch.device("cpu")) for name, value in values.items()},
        **flags,
    )
