"""How long sequences may be: by the model, by the executor, by what the KV cache holds."""

from scheduler_service.errors import InvalidFieldError, NeverFitsError
from scheduler_service.model_spec import ModelSpec
from scheduler_service.ranges import INT32_MAX
from scheduler_service.scheduler import Scheduler
from scheduler_service.sequence import Sequence


class SequenceLengths:
    """Follows the executor that is attached at the moment; without one only the model counts."""

    def __init__(self, model: ModelSpec, scheduler: Scheduler) -> None:
        self._model = model
        self._scheduler = scheduler

    @property
    def max_model_len(self) -> int:
        """Longest sequence: the model's own limit, or the executor's if that is less."""
        capacity = self._scheduler.capacity
        return min(self._model.max_model_len, capacity.max_model_len if capacity else INT32_MAX)

    def max_total_tokens(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """Longest length of a sequence, prompt and output."""
        if max_tokens is not None:
            return min(num_prompt_tokens + max_tokens, self.max_model_len)
        capacity = self._scheduler.capacity
        if capacity is None:
            return self.max_model_len
        # Without a limit of its own, a request is content with what the cache can hold.
        holds = min(self.max_model_len, capacity.max_kv_tokens + 1)
        return max(holds, num_prompt_tokens + 1)

    def check_max_tokens(self, max_tokens: int | None) -> None:
        """Raises NeverFitsError if not even a prompt of one token leaves room for the output."""
        capacity = self._scheduler.capacity
        if capacity is None or max_tokens is None:
            return
        needed = self.max_total_tokens(1, max_tokens) - 1
        if needed > capacity.max_kv_tokens:
            raise self._too_large(needed)

    def check_prompt(self, num_prompt_tokens: int) -> None:
        """Raises InvalidFieldError if the prompt leaves no room for an output token."""
        longest = self.max_model_len
        if num_prompt_tokens >= longest:
            raise InvalidFieldError(
                "prompt",
                f"the prompt has {num_prompt_tokens} tokens, but at most {longest - 1} leave room "
                "for an output token",
            )

    def never_fits(self, seq: Sequence) -> NeverFitsError:
        """Says why the executor can never hold a sequence."""
        if seq.num_tokens >= self.max_model_len:
            return NeverFitsError(
                f"the sequence has {seq.num_tokens} tokens, but the executor takes less than "
                f"{self.max_model_len}; send less, or give the executor a larger model length"
            )
        return self._too_large(seq.max_kv_tokens)

    def _too_large(self, num_needed: int) -> NeverFitsError:
        capacity = self._scheduler.capacity
        holds = capacity.max_kv_tokens if capacity else 0
        return NeverFitsError(
            f"prompt and max_tokens need {num_needed} tokens of KV cache, but it holds {holds}; "
            "send less, lower max_tokens, or give the executor more KV memory"
        )
