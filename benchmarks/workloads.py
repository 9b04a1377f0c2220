"""What the benchmarks send: lists of token ids with fixed output lengths."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

# The prompt of a request is made of ids below this, as in the workload that nano-vLLM ships.
_MAX_TOKEN_ID = 10_000
_BENCH256_REQUESTS = 256
_BENCH256_LENGTHS = (100, 1024)
_STREAM_INPUT_LEN = 128
_STREAM_OUTPUT_LEN = 512
_TEMPERATURE = 0.6


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and the number of tokens to generate for it."""

    prompt_token_ids: list[int]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that are all sent at once; end-of-sequence tokens do not stop them."""

    name: str
    requests: Sequence[Request]
    temperature: float
    # Whether ids were folded into a vocabulary that is smaller than the workload's ids.
    ids_folded: bool = False

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(request.prompt_token_ids) for request in self.requests)

    @property
    def num_output_tokens(self) -> int:
        """Tokens that a run generates."""
        return sum(request.max_tokens for request in self.requests)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(len(item.prompt_token_ids) + item.max_tokens for item in self.requests)

    def for_vocabulary(self, vocab_size: int) -> "Workload":
        """The same with every id taken modulo the size of a vocabulary."""
        if all(max(item.prompt_token_ids) < vocab_size for item in self.requests):
            return self
        folded = [
            Request([token % vocab_size for token in item.prompt_token_ids], item.max_tokens)
            for item in self.requests
        ]
        return Workload(self.name, folded, self.temperature, ids_folded=True)


def make_workload(name: str, scale: float) -> Workload:
    """Makes `bench256`, or `N` concurrent streams for a name like `streams8`.

    At scale 1 they are those of docs/performance.md. A smaller scale shrinks them for small
    machines: bench256 keeps its first round(256 * scale) requests, and in both kinds every prompt
    and output keeps its first round(length * scale) tokens; at least one of each stays.

    Raises:
        ValueError: There is no such workload, or the scale is not in (0, 1].
    """
    if not 0 < scale <= 1:
        raise ValueError(f"the scale must be in (0, 1], got {scale:g}")
    if name == "bench256":
        return _bench256(scale)
    count = name.removeprefix("streams")
    if count != name and count.isdecimal() and int(count) > 0:
        return _streams(int(count), scale)
    raise ValueError(f"there is no workload {name!r}; choose bench256 or streamsN, say streams8")


def _bench256(scale: float) -> Workload:
    """The workload that nano-vLLM's benchmark draws, number by number."""
    generator = random.Random(0)
    prompts = [
        [generator.randint(0, _MAX_TOKEN_ID) for _ in range(generator.randint(*_BENCH256_LENGTHS))]
        for _ in range(_BENCH256_REQUESTS)
    ]
    output_lens = [generator.randint(*_BENCH256_LENGTHS) for _ in range(_BENCH256_REQUESTS)]
    requests = [
        Request(prompt[: _shrink(len(prompt), scale)], _shrink(output_len, scale))
        for prompt, output_len in zip(prompts, output_lens, strict=True)
    ]
    return Workload("bench256", requests[: _shrink(len(requests), scale)], _TEMPERATURE)


def _streams(count: int, scale: float) -> Workload:
    generator = random.Random(count)
    input_len = _shrink(_STREAM_INPUT_LEN, scale)
    output_len = _shrink(_STREAM_OUTPUT_LEN, scale)
    requests = [
        Request([generator.randint(0, _MAX_TOKEN_ID) for _ in range(input_len)], output_len)
        for _ in range(count)
    ]
    return Workload(f"streams{count}", requests, _TEMPERATURE)


def _shrink(length: int, scale: float) -> int:
    return max(1, round(length * scale))
