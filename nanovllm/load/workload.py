"""Workloads: sessions made from numbers, from a trace, or from real prompts."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nanovllm.load.prompts import Conversation
from nanovllm.load.requests import LoadPrompt, LoadRequest, Session
from nanovllm.load.trace import TraceRow
from nanovllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class SyntheticWorkload:
    """Sessions of random token ids.

    Everything follows from `seed`. Two calls of `sessions` with different names share the prefixes
    and nothing else, so that a warm-up fills the prefix cache as an earlier hour of the same
    service would, without holding the prompts to come.
    """

    #: Random ids that each turn adds, and tokens that it generates.
    input_len: int
    output_len: int
    #: Ids are below this.
    vocab_size: int
    #: max_tokens is set from `output_len`.
    sampling_params: SamplingParams
    seed: int = 0
    #: Sessions begin with one of this many common prefixes of `prefix_len` ids; 0 for none.
    num_prefix_groups: int = 0
    prefix_len: int = 0
    num_turns: int = 1
    #: Mean of the exponentially distributed pauses between turns.
    mean_think_s: float = 0.0

    @property
    def longest(self) -> int:
        """Tokens of a session's last turn, prompt and output."""
        prefix_len = self.prefix_len if self.num_prefix_groups else 0
        return prefix_len + self.num_turns * (self.input_len + self.output_len)

    def sessions(self, count: int, name: str = "") -> list[Session]:
        """Draws sessions; another `name` draws others."""
        generator = random.Random(f"sessions {self.seed} {name}")
        prefixes = [
            _ids(random.Random(f"prefix {self.seed} {group}"), self.vocab_size, self.prefix_len)
            for group in range(self.num_prefix_groups)
        ]
        params = replace(self.sampling_params, max_tokens=self.output_len)

        def turn(prefix: list[int], think_s: float) -> LoadRequest:
            own = _ids(generator, self.vocab_size, self.input_len)
            return LoadRequest([*prefix, *own], params, think_s)

        def session() -> Session:
            prefix = generator.choice(prefixes) if prefixes else []
            turns = [turn(prefix, 0.0)]
            for _ in range(self.num_turns - 1):
                turns.append(turn([], _think_s(generator, self.mean_think_s)))
            return Session(turns)

        return [session() for _ in range(count)]


def trace_sessions(
    rows: Sequence[TraceRow],
    vocab_size: int,
    sampling_params: SamplingParams,
    seed: int,
    name: str = "",
) -> list[Session]:
    """Makes a session of random ids for each row; another `name` shares only the prefixes."""
    longest: dict[str, int] = defaultdict(int)
    for row in rows:
        longest[row.prefix_group] = max(longest[row.prefix_group], row.num_shared_tokens)
    prefixes = {
        group: _ids(random.Random(f"prefix {seed} {group}"), vocab_size, length)
        for group, length in longest.items()
    }
    generator = random.Random(f"trace {seed} {name}")

    def session(row: TraceRow) -> Session:
        shared = prefixes[row.prefix_group][: row.num_shared_tokens]
        own = _ids(generator, vocab_size, row.prompt_tokens - len(shared))
        params = replace(sampling_params, max_tokens=row.output_tokens)
        return Session([LoadRequest([*shared, *own], params)])

    return [session(row) for row in rows]


def text_sessions(
    conversations: Sequence[Conversation],
    output_len: int,
    sampling_params: SamplingParams,
    *,
    as_chat: bool,
    mean_think_s: float = 0.0,
    seed: int = 0,
) -> list[Session]:
    """Makes a session of each conversation.

    Args:
        conversations: What the users say.
        output_len: Tokens to generate where a conversation does not say how many.
        sampling_params: max_tokens is set for each request.
        as_chat: Whether turns are chat messages; plain text has only one turn.
        mean_think_s: Mean of the exponentially distributed pauses between turns.
        seed: Of the pauses.
    """
    generator = random.Random(f"think {seed}")

    def prompt(text: str) -> LoadPrompt:
        return [{"role": "user", "content": text}] if as_chat else text

    def session(conversation: Conversation) -> Session:
        params = replace(sampling_params, max_tokens=conversation.output_tokens or output_len)
        return Session(
            [
                LoadRequest(prompt(text), params, _think_s(generator, mean_think_s) if n else 0.0)
                for n, text in enumerate(conversation.user_turns)
            ]
        )

    return [session(conversation) for conversation in conversations]


def _ids(generator: random.Random, vocab_size: int, count: int) -> list[int]:
    return generator.choices(range(vocab_size), k=count)


def _think_s(generator: random.Random, mean_s: float) -> float:
    return generator.expovariate(1.0 / mean_s) if mean_s > 0 else 0.0
