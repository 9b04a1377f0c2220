"""How long sequences may be: by the model, by the executors, by what their KV caches hold."""

from scheduler_service.errors import InvalidFieldError, NeverFitsError
from scheduler_service.executors.load import FleetLoad
from scheduler_service.model_spec import ModelSpec
from scheduler_service.sequence import Sequence


class SequenceLengths:
    """Follows the executors that take sequences at the moment; without any only the model counts.

    What the largest of them can hold is what requests may have.
    """

    def __init__(self, model: ModelSpec, load: FleetLoad) -> None:
        self._model = model
        self._load = load

    @property
    def max_model_len(self) -> int:
        """Longest sequence: the model's own limit, or the largest executor's if that is less."""
        lengths = [capacity.max_model_len for capacity in self._load.open_capacities]
        return min(self._model.max_model_len, max(lengths, default=self._model.max_model_len))

    def max_total_tokens(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """Longest length of a sequence, prompt and output."""
        if max_tokens is not None:
            return min(num_prompt_tokens + max_tokens, self.max_model_len)
        capacities = self._load.open_capacities
        if not capacities:
            return self.max_model_len
        # Without a limit of its own, a request is content with what a cache can hold.
        holds = max(min(each.max_model_len, each.max_kv_tokens + 1) for each in capacities)
        return max(min(holds, self._model.max_model_len), num_prompt_tokens + 1)

    def check_max_tokens(self, max_tokens: int | None) -> None:
        """Raises NeverFitsError if not even a prompt of one token leaves room for the output."""
        if max_tokens is None or not self._load.is_connected:
            return
        needed = self.max_total_tokens(1, max_tokens) - 1
        if needed > self._max_kv_tokens:
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
        """Says why no executor can ever hold a sequence."""
        if seq.num_tokens >= self.max_model_len:
            return NeverFitsError(
                f"the sequence has {seq.num_tokens} tokens, but the executor takes less than "
                f"{self.max_model_len}; send less, or give the executor a larger model length"
            )
        return self._too_large(seq.max_kv_tokens)

    @property
    def _max_kv_tokens(self) -> int:
        """What the largest KV cache holds; 0 without any."""
        return max((capacity.max_kv_tokens for capacity in self._load.open_capacities), default=0)

    def _too_large(self, num_needed: int) -> NeverFitsError:
        return NeverFitsError(
            f"prompt and max_tokens need {num_needed} tokens of KV cache, but it holds "
            f"{self._max_kv_tokens}; send less, lower max_tokens, or give the executor more KV "
            "memory"
        )
