"""What the routing benchmark sends: conversations whose every token is known beforehand.

The answers are a function of seed and position (`answer_token`), which the timed executor computes
as well. So the prompt of a turn continues the turn before, whoever answered it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

_VOCAB_SIZE = 50_000
_MIN_SYSTEM_TOKENS, _MAX_SYSTEM_TOKENS = 256, 1_024
_NUM_GROUPS = 16
_HOT_PREFIX_TOKENS = 1_024
_HOT_SHARE = 0.8
_BURST_SIZE = 16
_BURST_S = 0.02


def answer_token(seed: int, position: int) -> int:
    """The token that the model puts at a position of a sequence."""
    return (seed * 7_919 + position * 104_729) % _VOCAB_SIZE


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a conversation."""

    # The prompt is this many leading tokens of the conversation.
    num_prompt_tokens: int
    num_output_tokens: int
    # Pause between the end of the turn before and this one; 0 for the first.
    think_time_s: float

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return self.num_prompt_tokens + self.num_output_tokens


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that each resend everything before them."""

    seed: int
    start_s: float
    # Conversations of one group begin with the same tokens, this many.
    group: int
    num_shared_tokens: int
    token_ids: list[int]
    turns: Sequence[Turn]


@dataclass(frozen=True, slots=True)
class Workload:
    """Conversations in the order of their starts."""

    name: str
    conversations: Sequence[Conversation]

    @property
    def num_requests(self) -> int:
        """Turns of all conversations."""
        return sum(len(each.turns) for each in self.conversations)


def multi_turn(
    name: str, num_conversations: int, starts_per_s: float, think_time_s: float, seed: int
) -> Workload:
    """Conversations of two to eight turns that start as a Poisson process.

    Each begins with one of 16 system prompts, taken with a probability of 1/rank (Zipf's law), for
    few applications have most of the users. Pauses are distributed exponentially.
    """
    generator = random.Random(seed)
    systems = [
        _random_tokens(generator, generator.randint(_MIN_SYSTEM_TOKENS, _MAX_SYSTEM_TOKENS))
        for _ in range(_NUM_GROUPS)
    ]
    weights = [1 / rank for rank in range(1, _NUM_GROUPS + 1)]
    conversations = []
    start_s = 0.0
    for number in range(num_conversations):
        start_s += generator.expovariate(starts_per_s)
        group = generator.choices(range(_NUM_GROUPS), weights)[0]
        token_ids = list(systems[group])
        turns = []
        for index in range(generator.randint(2, 8)):
            token_ids += _random_tokens(generator, generator.randint(20, 200))
            turn = Turn(
                num_prompt_tokens=len(token_ids),
                num_output_tokens=generator.randint(32, 224),
                think_time_s=generator.expovariate(1 / think_time_s) if index else 0.0,
            )
            token_ids += [
                answer_token(number, position)
                for position in range(turn.num_prompt_tokens, turn.num_tokens)
            ]
            turns.append(turn)
        conversations.append(
            Conversation(number, start_s, group, len(systems[group]), token_ids, turns)
        )
    return Workload(name, conversations)


def hot_prefix(name: str, num_requests: int, requests_per_s: float, seed: int) -> Workload:
    """Single requests as a Poisson process; four of five begin with the same 1,024 tokens.

    The others have as long a prefix to themselves.
    """
    generator = random.Random(seed)
    hot = _random_tokens(generator, _HOT_PREFIX_TOKENS)
    conversations = []
    start_s = 0.0
    for number in range(num_requests):
        start_s += generator.expovariate(requests_per_s)
        is_hot = generator.random() < _HOT_SHARE
        prefix = hot if is_hot else _random_tokens(generator, _HOT_PREFIX_TOKENS)
        conversations.append(
            _single(generator, number, start_s, 0 if is_hot else number + 1, prefix)
        )
    return Workload(name, conversations)


def bursts(name: str, num_bursts: int, bursts_per_s: float, seed: int) -> Workload:
    """Sixteen requests within 20 ms about a text of 1,024 to 4,096 tokens that nobody sent before.

    Bursts come as a Poisson process.
    """
    generator = random.Random(seed)
    conversations = []
    start_s = 0.0
    for burst in range(num_bursts):
        start_s += generator.expovariate(bursts_per_s)
        text = _random_tokens(generator, generator.randint(1_024, 4_096))
        for member in range(_BURST_SIZE):
            number = burst * _BURST_SIZE + member
            at_s = start_s + generator.uniform(0.0, _BURST_S)
            conversations.append(_single(generator, number, at_s, burst, text))
    conversations.sort(key=lambda each: each.start_s)
    return Workload(name, conversations)


def _single(
    generator: random.Random, number: int, start_s: float, group: int, prefix: list[int]
) -> Conversation:
    token_ids = prefix + _random_tokens(generator, generator.randint(16, 128))
    turn = Turn(len(token_ids), generator.randint(32, 160), think_time_s=0.0)
    return Conversation(number, start_s, group, len(prefix), token_ids, [turn])


def _random_tokens(generator: random.Random, count: int) -> list[int]:
    return generator.choices(range(_VOCAB_SIZE), k=count)
