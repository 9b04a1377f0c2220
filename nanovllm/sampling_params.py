"""How tokens are chosen and when to stop, as a value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from nanovllm.v1 import inference_pb2 as pb

_INT_BITS = {"top_k": 32, "seed": 64, "n": 32, "max_tokens": 32, "min_tokens": 32, "logprobs": 32}
_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
_FLAGS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    None leaves a field to the server, which takes the model's generation_config.json or the default
    given here. Types are checked here; ranges by the server, which names the field. See
    `SamplingParams` in protos/nanovllm/v1/inference.proto for the order of application.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: An integer does not fit its field.
    """

    #: Divides the logits; 0 means greedy. Default: 1.
    temperature: float | None = None
    #: Keeps the smallest set of most probable tokens whose mass reaches it. Default: 1.
    top_p: float | None = None
    #: Keeps this many most probable tokens; 0 or -1 keeps all. Default: 0.
    top_k: int | None = None
    #: Keeps tokens at least this many times as probable as the most probable one. Default: 0.
    min_p: float | None = None
    #: Makes sampling repeatable. Default: random.
    seed: int | None = None
    #: Number of completions. Default: 1.
    n: int | None = None
    #: Upper bound on generated tokens. Default: up to the model's length.
    max_tokens: int | None = None
    #: Nothing stops a completion before this many tokens. Default: 0.
    min_tokens: int | None = None
    #: A string, or strings, that stop a completion.
    stop: str | Sequence[str] = ()
    #: Token ids that stop a completion, beside end-of-sequence.
    stop_token_ids: Sequence[int] = ()
    #: Goes on past end-of-sequence tokens. Default: False.
    ignore_eos: bool | None = None
    #: Leaves the matched stop string in the text. Default: False.
    include_stop_str_in_output: bool | None = None
    #: Subtracted once from the logit of every generated token. Default: 0.
    presence_penalty: float | None = None
    #: Subtracted from a token's logit once per earlier generation of it. Default: 0.
    frequency_penalty: float | None = None
    #: Divides positive and multiplies negative logits of earlier tokens. Default: 1.
    repetition_penalty: float | None = None
    #: Token id to what is added to its logit.
    logit_bias: Mapping[int, float] | None = None
    #: Returns log-probabilities, with this many most probable tokens. Default: none.
    logprobs: int | None = None
    #: Leaves special tokens out of the text. Default: True.
    skip_special_tokens: bool | None = None
    #: Whether text is produced at all. Default: True.
    detokenize: bool | None = None

    def __post_init__(self) -> None:
        for name, bits in _INT_BITS.items():
            value = getattr(self, name)
            if value is not None:
                _check_int(name, value, bits)
        for name in _FLOATS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Real) or isinstance(value, bool)):
                raise TypeError(f"{name} must be a number, got {value!r}")
        for name in _FLAGS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise TypeError(f"{name} must be True, False or None, got {value!r}")
        for stop in self._stop_strings():
            if not isinstance(stop, str):
                raise TypeError(f"stop must be a string or strings, got {stop!r}")
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 32)
        for token_id, bias in (self.logit_bias or {}).items():
            _check_int("logit_bias", token_id, 32)
            if not isinstance(bias, Real):
                raise TypeError(f"logit_bias[{token_id}] must be a number, got {bias!r}")

    def to_proto(self) -> pb.SamplingParams:
        """Returns the message, with unset fields left unset."""
        message = pb.SamplingParams(
            stop=self._stop_strings(),
            stop_token_ids=self.stop_token_ids,
            logit_bias=self.logit_bias or {},
        )
        for name in (*_INT_BITS, *_FLOATS, *_FLAGS):
            value = getattr(self, name)
            if value is not None:
                setattr(message, name, value)
        return message

    @classmethod
    def from_proto(cls, message: pb.SamplingParams) -> "SamplingParams":
        """Returns the value of a message."""
        scalars: dict[str, Any] = {
            name: getattr(message, name)
            for name in (*_INT_BITS, *_FLOATS, *_FLAGS)
            if message.HasField(name)
        }
        return cls(
            stop=tuple(message.stop),
            stop_token_ids=tuple(message.stop_token_ids),
            logit_bias=dict(message.logit_bias) or None,
            **scalars,
        )

    def set_fields(self) -> dict[str, Any]:
        """Returns the fields that are set, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value not in (None, (), [])}

    def _stop_strings(self) -> Sequence[str]:
        return (self.stop,) if isinstance(self.stop, str) else self.stop


def _check_int(name: str, value: object, bits: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    limit = 1 << (bits - 1)
    if not -limit <= int(value) < limit:
        raise ValueError(f"{name} must fit into {bits} bits, got {value}")
