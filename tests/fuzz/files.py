"""Model directories whose files are wrong in one way."""

import json
import random
import struct
from pathlib import Path
from typing import Any

#: What stands where something else is expected.
JSON_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**31 - 1, 2**63, -(2**63), 10**400),
    *(0.5, -0.5, 1e308, 1e-320, float("inf"), float("-inf"), float("nan")),
    *("", "1", "silu", "float32", "\0", "\ud800", [], [1], ["a"], [[]], {}, {"a": 1}),
)


def with_value(path: Path, key: str, value: Any) -> None:
    """Sets one key of a JSON file, whatever the value."""
    content = json.loads(path.read_text())
    content[key] = value
    path.write_text(json.dumps(content))


def nested(depth: int) -> str:
    """JSON that is nested too deeply for a recursive parser."""
    return "[" * depth + "]" * depth


def mutated_json(text: str, rng: random.Random) -> str:
    """JSON with one value, anywhere in it, replaced, removed or moved."""
    content = json.loads(text)
    owner, key = rng.choice(list(_places(content)))
    match rng.randrange(4):
        case 0:
            del owner[key]
        case 1:
            owner[key] = [owner[key]]
        case _:
            owner[key] = rng.choice(JSON_VALUES)
    return json.dumps(content)


def _places(content: Any) -> Any:
    """Every list or object below `content` with each of its keys, but few of a long one."""
    if not isinstance(content, (dict, list)):
        return
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    for key in keys[:24]:
        yield content, key
        yield from _places(content[key])


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a file, as https://huggingface.co/docs/safetensors has them."""
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_safetensors(header: str, tensors: bytes, length: int | None = None) -> bytes:
    """A file with this header; `length` is what it claims to be the header's."""
    encoded = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + tensors
