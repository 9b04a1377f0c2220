"""What a load run sends: requests, alone or as the turns of a conversation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from nanovllm.requests import Message
from nanovllm.sampling_params import SamplingParams

#: Text, token ids or chat messages.
LoadPrompt: TypeAlias = str | Sequence[int] | Sequence[Message]


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request to send, or one turn of a session."""

    prompt: LoadPrompt
    sampling_params: SamplingParams
    #: Seconds between the end of the turn before and this one; nothing for a first turn.
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Session:
    """Turns of one user, each sent when the one before has its answer.

    The first turn's prompt is sent as it is. Those of later turns hold only what the user adds:
    token ids after token ids, messages after messages.
    """

    turns: Sequence[LoadRequest]


@dataclass(slots=True)
class Answer:
    """What one request generated, for the turn after it."""

    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)


def next_prompt(prompt: LoadPrompt, answer: Answer, addition: LoadPrompt) -> LoadPrompt:
    """Returns the conversation so far, its last answer and what the user adds.

    Raises:
        TypeError: The prompts are neither both token ids nor both lists of messages.
    """
    sent: list[Any] = list(prompt)
    added: list[Any] = list(addition)
    if all(isinstance(item, int) for item in (*sent, *added)):
        return [*sent, *answer.token_ids, *added]
    if all(isinstance(item, Mapping) for item in (*sent, *added)):
        return [*sent, {"role": "assistant", "content": "".join(answer.text)}, *added]
    raise TypeError(
        "the turns of a session are either all token ids or all lists of chat messages; "
        f"got {prompt!r:.60} and then {addition!r:.60}"
    )
