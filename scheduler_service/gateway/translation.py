"""From vLLM's GenerateRequest to ours, which is then validated like every other.

Every field of the message is named here or refused: one that is set and not honoured is an error.
"""

from collections.abc import Iterator
from typing import Any

from smg_grpc_proto.generated import vllm_engine_pb2

from nanovllm.v1 import inference_pb2
from scheduler_service.errors import InvalidFieldError
from scheduler_service.ranges import INT32_MAX

_SUPPORTED_FIELDS = {
    "request_id",
    "tokenized",
    "tokenized.input_ids",
    # For debugging, says the protocol.
    "tokenized.original_text",
    "text",
    "stream",
    "sampling_params",
    "sampling_params.temperature",
    "sampling_params.top_p",
    "sampling_params.top_k",
    "sampling_params.min_p",
    "sampling_params.frequency_penalty",
    "sampling_params.presence_penalty",
    "sampling_params.repetition_penalty",
    "sampling_params.max_tokens",
    "sampling_params.min_tokens",
    "sampling_params.stop",
    "sampling_params.stop_token_ids",
    "sampling_params.skip_special_tokens",
    # About text, which the gateway makes from the tokens.
    "sampling_params.spaces_between_special_tokens",
    "sampling_params.ignore_eos",
    "sampling_params.n",
    "sampling_params.logprobs",
    "sampling_params.seed",
    "sampling_params.include_stop_str_in_output",
    "sampling_params.logit_bias",
}
# Where our validation calls a field something else.
_THEIR_NAMES = {"token_ids": "tokenized.input_ids", "token_ids.ids": "tokenized.input_ids"}
# Without `optional`, zero cannot be told from unset; a value of zero would make no sense here.
_UNSET_IF_ZERO = ("top_p", "repetition_penalty", "n")
_AS_THEY_ARE = ("top_k", "min_p", "frequency_penalty", "presence_penalty", "min_tokens")
_OPTIONAL = ("temperature", "logprobs", "seed")
_LISTS = ("stop", "stop_token_ids")


def translate(
    request: vllm_engine_pb2.GenerateRequest, *, with_text: bool = False
) -> inference_pb2.GenerateRequest:
    """Our request for theirs. Raises InvalidFieldError for what is not supported.

    The gateway makes the text. Here it is made where a stop string ends the request, and on
    `with_text`.
    """
    for name in _set_fields(request):
        if name not in _SUPPORTED_FIELDS:
            raise InvalidFieldError(name, "is not supported by this server")
    translated = inference_pb2.GenerateRequest(
        request_id=request.request_id,
        sampling_params=_sampling_params(request.sampling_params),
    )
    translated.sampling_params.detokenize = with_text or bool(request.sampling_params.stop)
    kind = request.WhichOneof("input")
    if kind == "tokenized":
        translated.token_ids.ids.extend(_token_ids(request.tokenized.input_ids))
    elif kind == "text":
        translated.text = request.text
    else:
        raise InvalidFieldError("input", "set one of tokenized and text")
    return translated


def with_their_name(error: InvalidFieldError) -> InvalidFieldError:
    """The error of our validation, about the field that the caller knows."""
    return InvalidFieldError(_THEIR_NAMES.get(error.field, error.field), error.description)


def _sampling_params(params: vllm_engine_pb2.SamplingParams) -> inference_pb2.SamplingParams:
    fields: dict[str, Any] = {name: getattr(params, name) for name in _AS_THEY_ARE}
    fields |= {name: value for name in _UNSET_IF_ZERO if (value := getattr(params, name))}
    fields |= {name: getattr(params, name) for name in _OPTIONAL if params.HasField(name)}
    fields |= {name: list(getattr(params, name)) for name in _LISTS}
    for name in ("top_k", "min_tokens", "n", "stop_token_ids"):
        _check_int32(f"sampling_params.{name}", fields.get(name, 0))
    if params.HasField("max_tokens"):
        # Gateways pass on what they were given, so a limit of nothing and one beyond every context
        # arrive here; the length of the model bounds it anyway.
        fields["max_tokens"] = min(max(params.max_tokens, 1), INT32_MAX)
    return inference_pb2.SamplingParams(
        **fields,
        logit_bias=params.logit_bias,
        ignore_eos=params.ignore_eos,
        skip_special_tokens=params.skip_special_tokens,
        include_stop_str_in_output=params.include_stop_str_in_output,
    )


def _token_ids(token_ids: Any) -> Any:
    _check_int32("tokenized.input_ids", token_ids)
    return token_ids


def _check_int32(name: str, value: Any) -> None:
    """Their numbers are unsigned; one that ours cannot hold is out of every range."""
    largest = value if isinstance(value, int) else max(value, default=0)
    if largest > INT32_MAX:
        raise InvalidFieldError(name, f"{largest} is too large")


def _set_fields(message: Any, prefix: str = "") -> Iterator[str]:
    """Full names of all fields that are set, the ones inside messages included."""
    for field, value in message.ListFields():
        name = f"{prefix}{field.name}"
        yield name
        if field.message_type is not None and not field.is_repeated:
            yield from _set_fields(value, f"{name}.")
