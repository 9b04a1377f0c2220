"""Requests of many kinds, the same for the same seed, and what their clients do with them."""

import random
from dataclasses import dataclass
from enum import Enum

from nanovllm.requests import Prompt
from nanovllm.sampling_params import SamplingParams

_VOCAB_SIZE = 256
_NUM_PREFIXES = 4
_PREFIX_TOKENS = 40
_STOP_STRINGS = ("e", "th", "\n\n", "0", "\u20ac", "zz")


class Behaviour(Enum):
    """What a client does."""

    # Resumes, and reads to the end.
    READ = "read"
    # The same with pauses.
    READ_SLOWLY = "read slowly"
    # Reads to the end, but does not resume: it may see an error and no wrong token before it.
    FRAGILE = "not resumable"
    # Leaves after some tokens.
    CANCEL = "cancel"
    # Asks another call to end the request after some tokens.
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Case:
    """One request of the pool; sent many times."""

    name: str
    prompt: Prompt
    params: SamplingParams
    priority: int
    behaviour: Behaviour
    # Tokens after which CANCEL and ABORT act.
    act_after: int


def make_cases(count: int, seed: int) -> list[Case]:
    """Returns the pool."""
    rng = random.Random(seed)
    prefixes = [_token_ids(rng, _PREFIX_TOKENS) for _ in range(_NUM_PREFIXES)]
    behaviours = [
        *[Behaviour.READ] * 6,
        *(Behaviour.READ_SLOWLY, Behaviour.FRAGILE, Behaviour.CANCEL, Behaviour.ABORT),
    ]
    return [
        Case(
            name=f"case {index}",
            prompt=_prompt(rng, prefixes),
            params=_params(rng),
            priority=rng.choice([-1, 0, 0, 0, 2]),
            behaviour=behaviours[index % len(behaviours)],
            act_after=rng.randint(1, 20),
        )
        for index in range(count)
    ]


def burst_case(rng: random.Random, max_tokens: int) -> Case:
    """One of many requests that arrive together and do not stay to the end."""
    return Case(
        name="burst",
        prompt=_token_ids(rng, rng.randint(8, 60)),
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
        priority=0,
        behaviour=Behaviour.CANCEL,
        act_after=rng.randint(1, max_tokens),
    )


def _token_ids(rng: random.Random, count: int) -> list[int]:
    return rng.choices(range(_VOCAB_SIZE), k=count)


def _prompt(rng: random.Random, prefixes: list[list[int]]) -> Prompt:
    kind = rng.randrange(4)
    words = " ".join(rng.choices(["sea", "\u00e9t\u00e9", "stone", "\u20ac5", "wind"], k=6))
    if kind == 0:
        return _token_ids(rng, rng.randint(1, 80))
    if kind == 1:
        return rng.choice(prefixes) + _token_ids(rng, rng.randint(1, 20))
    if kind == 2:
        return words
    return [{"role": "user", "content": words}]


def _params(rng: random.Random) -> SamplingParams:
    max_tokens = rng.choice([5, 10, 20, 40, 100])
    is_sampled = rng.random() < 0.5
    return SamplingParams(
        temperature=rng.choice([0.7, 2.0]) if is_sampled else 0.0,
        top_p=rng.choice([1.0, 0.9]) if is_sampled else 1.0,
        seed=rng.getrandbits(40),
        n=rng.choice([1, 1, 1, 2, 3]),
        max_tokens=max_tokens,
        min_tokens=rng.choice([0, 0, max_tokens // 2]),
        stop=rng.sample(_STOP_STRINGS, 2) if rng.random() < 0.3 else [],
        ignore_eos=rng.random() < 0.8,
        include_stop_str_in_output=rng.random() < 0.3,
        presence_penalty=rng.choice([0.0, 0.0, 0.5]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.3]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        logprobs=rng.choice([None, None, 0, 2]),
    )
