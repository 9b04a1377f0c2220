"""Random protobuf messages: every field of a message, now plausible, now at or beyond its limits.

Driven by the descriptors, so that a new field is covered from the day it appears. `random.Random`
is the only source of choices; hypothesis can stand in for it.
"""

import random
import struct
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from nanovllm.v1 import inference_pb2 as pb

#: Failures that blame the request, the load or the caller, never the server.
PROPER = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
)

# What a text, an id or a salt may be that somebody did not think of.
_STRINGS = (
    *("", " ", "a", "\0", "\n", "\u202e", "\ufffd", "\U0001f600", "\u00e9", "{}", "[1]", "null"),
    *("{{ 7 * 7 }}", "{% for x in range(9) %}x{% endfor %}", "<|im_end|>", "../../etc", "%s%n"),
    *("a" * 127, "a" * 129, "\u00e9" * 200, "a" * 257, "word " * 400, "a" * 20_000),
)
_FLOATS = (
    *(0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 1e-45, 1e-30, 1e-7, 100.0, 100.1, -100.0, 3.4e38),
    *(float("nan"), float("inf"), float("-inf")),
)
_KINDS = FieldDescriptor
_INTEGER_BITS = {
    _KINDS.TYPE_INT32: (31, True),
    _KINDS.TYPE_INT64: (63, True),
    _KINDS.TYPE_UINT32: (32, False),
    _KINDS.TYPE_UINT64: (64, False),
    _KINDS.TYPE_FIXED32: (32, False),
    _KINDS.TYPE_FIXED64: (64, False),
    _KINDS.TYPE_SFIXED32: (31, True),
    _KINDS.TYPE_SFIXED64: (63, True),
}

Choose = Callable[[random.Random], Any]


def _one_of(*values: Any) -> Choose:
    return lambda rng: rng.choice(values)


def _ids(most: int) -> Choose:
    return lambda rng: [rng.randrange(4) for _ in range(rng.randint(1, most))]


#: Values that validation takes, for fields where a random one is nearly always refused.
PLAUSIBLE: dict[str, Choose] = {
    "GenerateRequest.request_id": lambda rng: rng.choice(("", "", f"r{rng.randrange(6)}")),
    "GenerateRequest.priority": _one_of(0, 1, -1000, 1000),
    "GenerateRequest.cache_salt": _one_of("", "salt", "\u00e9"),
    "GenerateRequest.text": _one_of("a", "Hello", "\U0001f600", "<|im_end|>", "a" * 60),
    "TokenIds.ids": _ids(40),
    "ChatMessage.role": _one_of("user", "system", "assistant", "tool", "\n"),
    "ChatMessage.content": _one_of("", "Hi", "{{ 1 }}", "\u00e9"),
    "ChatMessages.template_kwargs_json": _one_of("", "{}", '{"enable_thinking": false}'),
    "SamplingParams.temperature": _one_of(0.0, 1e-30, 0.7, 1.0, 100.0),
    "SamplingParams.top_p": _one_of(1e-30, 0.5, 1.0),
    "SamplingParams.top_k": _one_of(-1, 0, 1, 5, 2**31 - 1),
    "SamplingParams.min_p": _one_of(0.0, 0.1, 1.0),
    "SamplingParams.n": _one_of(1, 1, 1, 2, 3, 17),
    "SamplingParams.max_tokens": _one_of(1, 1, 2, 3, 9, 40),
    "SamplingParams.min_tokens": _one_of(0, 1),
    "SamplingParams.stop": lambda rng: [
        rng.choice(("!", "#", '"!', "\u00e9", "a" * 256)) for _ in range(rng.randint(1, 3))
    ],
    "SamplingParams.stop_token_ids": _ids(3),
    "SamplingParams.presence_penalty": _one_of(-2.0, 0.0, 2.0),
    "SamplingParams.frequency_penalty": _one_of(-2.0, 0.0, 2.0),
    "SamplingParams.repetition_penalty": _one_of(1e-30, 1.0, 10.0),
    "SamplingParams.logit_bias": lambda rng: {
        rng.randrange(300): rng.choice((-100.0, 0.0, 100.0)) for _ in range(rng.randint(1, 4))
    },
    "SamplingParams.logprobs": _one_of(0, 1, 20),
    "DetokenizeRequest.token_ids": _ids(20),
}


def random_message(kind: type[Message], rng: random.Random, wildness: float) -> Any:
    """A message of a type.

    Args:
        kind: The generated class.
        rng: Where choices come from.
        wildness: Chance of each field to hold anything at all rather than something plausible.
    """
    message = kind()
    chosen = {
        oneof.name: rng.choice(oneof.fields)
        for oneof in message.DESCRIPTOR.oneofs
        if not oneof.fields[0].has_presence or len(oneof.fields) > 1
    }
    for field in message.DESCRIPTOR.fields:
        oneof = field.containing_oneof
        if oneof is not None and oneof.name in chosen:
            # Now and then none of them.
            if chosen[oneof.name] is not field or rng.random() < 0.02:
                continue
        elif rng.random() < (0.05 if _is_needed(field) else 0.7):
            continue
        _fill(message, field, rng, wildness)
    return message


def random_request(rng: random.Random) -> pb.GenerateRequest:
    """A request of the public API, in two of three cases one that is served or nearly so."""
    wildness = rng.choice((0.0, 0.0, 0.03, 0.3))
    request: pb.GenerateRequest = random_message(pb.GenerateRequest, rng, wildness)
    if rng.random() < 0.9:
        # Resuming needs fields that agree with each other; by chance they never do.
        request.ClearField("resume")
    if not wildness and not request.sampling_params.HasField("max_tokens"):
        request.sampling_params.max_tokens = PLAUSIBLE["SamplingParams.max_tokens"](rng)
    return request


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The bytes with a few of them changed, cut out, doubled or replaced."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start = rng.randint(0, len(result))
        end = min(len(result), start + rng.choice((1, 1, 4, 8, 64)))
        match rng.randrange(5):
            case 0:
                del result[start:end]
            case 1:
                result[start:start] = result[start:end]
            case 2:
                result[start:end] = bytes(rng.randrange(256) for _ in range(end - start))
            case 3:
                result[start:start] = struct.pack("<i", rng.choice((-1, 0, 2**31 - 1, -(2**31))))
            case _:
                del result[start:]
    return bytes(result)


def random_int32s(rng: random.Random, most: int) -> bytes:
    """A packed array of the executor protocol; rarely of a length that no array has."""
    small = [rng.choice((0, 1, 2, 3, 5, 7, 63, -1)) for _ in range(rng.randint(0, most))]
    if rng.random() < 0.1:
        small.append(rng.choice((2**31 - 1, -(2**31), 320, 4096)))
    data = struct.pack(f"<{len(small)}i", *small)
    return data if rng.random() < 0.97 else data + bytes(rng.randint(1, 3))


def _fill(message: Message, field: FieldDescriptor, rng: random.Random, wildness: float) -> None:
    name = f"{message.DESCRIPTOR.name}.{field.name}"
    if name in PLAUSIBLE and rng.random() >= wildness:
        _assign(message, field, PLAUSIBLE[name](rng))
    elif _is_map(field):
        key, value = field.message_type.fields
        count = rng.choice((1, 2, 2, 2, 300))
        _assign(message, field, {_scalar(key, rng): _scalar(value, rng) for _ in range(count)})
    elif field.type == _KINDS.TYPE_MESSAGE:
        kind = type(getattr(message, field.name)) if not field.is_repeated else None
        for _ in range(rng.choice((1, 1, 2, 5)) if kind is None else 1):
            into = getattr(message, field.name)
            target = into.add() if kind is None else into
            target.CopyFrom(random_message(type(target), rng, wildness))
            if kind is not None:
                into.SetInParent()
    elif field.is_repeated:
        count = rng.choice((0, 1, 2, 2, 2, 33, 65, 300))
        _assign(message, field, [_scalar(field, rng) for _ in range(count)])
    else:
        _assign(message, field, _scalar(field, rng))


def _is_needed(field: FieldDescriptor) -> bool:
    """Whether a message without the field says next to nothing."""
    if field.type == _KINDS.TYPE_MESSAGE:
        return not _is_map(field)
    return field.full_name.endswith((".TokenIds.ids", ".ChatMessage.role"))


def _is_map(field: FieldDescriptor) -> bool:
    return field.type == _KINDS.TYPE_MESSAGE and field.message_type.GetOptions().map_entry


def _assign(message: Message, field: FieldDescriptor, value: Any) -> None:
    if _is_map(field):
        getattr(message, field.name).update(value)
    elif field.is_repeated:
        getattr(message, field.name).extend(value)
    else:
        setattr(message, field.name, value)


def _scalar(field: FieldDescriptor, rng: random.Random) -> Any:
    if field.type == _KINDS.TYPE_STRING:
        return rng.choice(_STRINGS)
    if field.type == _KINDS.TYPE_BOOL:
        return rng.random() < 0.5
    if field.type in (_KINDS.TYPE_FLOAT, _KINDS.TYPE_DOUBLE):
        return rng.choice(_FLOATS)
    if field.type == _KINDS.TYPE_BYTES:
        return bytes(rng.randrange(256) for _ in range(rng.choice((0, 1, 4, 64))))
    if field.type == _KINDS.TYPE_ENUM:
        return rng.choice(field.enum_type.values).number
    bits, signed = _INTEGER_BITS[field.type]
    most = 2**bits - 1
    return rng.choice(
        (0, 1, 2, 64, 65, 320, 1001, most, *((-1, -1001, -most - 1) if signed else ()))
    )
