"""From the public request message to values that the engine can rely on.

Every field is honoured or refused by name here; nothing behind this module checks again.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from nanovllm.v1 import inference_pb2
from scheduler_service.errors import InvalidFieldError
from scheduler_service.model_spec import ModelSpec
from scheduler_service.ranges import INT32_MAX, SAMPLING_RANGES, Range
from scheduler_service.resume import ResumeSpec, validate_resume
from scheduler_service.sequence import SlotSampling
from scheduler_service.text.tokenizer import ChatTurn

MAX_N = 64
MAX_REQUEST_ID_CHARS = 128
MAX_CACHE_SALT_BYTES = 256
MAX_STOP_STRINGS = 32
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIASES = 256
MAX_LOGPROBS = 20
MAX_CHAT_MESSAGES = 4096
MAX_PRIORITY = 1000


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation for the chat template."""

    turns: tuple[ChatTurn, ...]
    add_generation_prompt: bool
    template_kwargs_json: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids."""

    token_ids: list[int]


Prompt = TextPrompt | ChatPrompt | TokenPrompt


@dataclass(frozen=True, slots=True)
class RequestKey:
    """Names a live request; every owner has a space of ids of its own."""

    request_id: str
    # The authenticated caller, or "" for everybody else.
    owner: str = ""


@dataclass(frozen=True, slots=True)
class GenerateSpec:
    """A valid request whose prompt is not tokenized yet."""

    request_id: str
    prompt: Prompt
    priority: int
    cache_salt: str
    n: int
    # One per completion; they differ in their seed.
    samplings: tuple[SlotSampling, ...]
    max_tokens: int | None
    min_tokens: int
    stop: tuple[str, ...]
    include_stop_str_in_output: bool
    stop_token_ids: tuple[int, ...]
    skip_special_tokens: bool
    detokenize: bool
    # Whose request id it is; see RequestKey.
    owner: str = ""
    # Set if a stream that broke may be continued by another call.
    resume: ResumeSpec | None = None

    @property
    def key(self) -> RequestKey:
        """What the engine knows the request by."""
        return RequestKey(self.request_id, self.owner)


def validate_generate(request: inference_pb2.GenerateRequest, model: ModelSpec) -> GenerateSpec:
    """Checks every field. Raises InvalidFieldError for the first that is wrong."""
    params = request.sampling_params
    if len(request.request_id) > MAX_REQUEST_ID_CHARS:
        raise InvalidFieldError("request_id", f"at most {MAX_REQUEST_ID_CHARS} characters")
    if len(request.cache_salt.encode()) > MAX_CACHE_SALT_BYTES:
        raise InvalidFieldError("cache_salt", f"at most {MAX_CACHE_SALT_BYTES} bytes")
    _check_range("priority", request.priority, -MAX_PRIORITY, MAX_PRIORITY)

    n = params.n if params.HasField("n") else 1
    _check_range("sampling_params.n", n, 1, MAX_N)
    max_tokens = params.max_tokens if params.HasField("max_tokens") else None
    if max_tokens is not None:
        _check_range("sampling_params.max_tokens", max_tokens, 1, INT32_MAX)
    _check_range(
        "sampling_params.min_tokens", params.min_tokens, 0, max_tokens or model.max_model_len
    )
    detokenize = params.detokenize if params.HasField("detokenize") else True
    stop = _valid_stop_strings(params.stop)
    if stop and not detokenize:
        raise InvalidFieldError("sampling_params.stop", "needs text; do not set detokenize=false")
    if len(params.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidFieldError(
            "sampling_params.stop_token_ids",
            f"at most {MAX_STOP_TOKEN_IDS} ids, got {len(params.stop_token_ids)}",
        )
    stop_token_ids = _valid_token_ids(
        "sampling_params.stop_token_ids", params.stop_token_ids, model.vocab_size
    )
    eos = () if params.ignore_eos else model.eos_token_ids
    return GenerateSpec(
        request_id=request.request_id or secrets.token_hex(8),
        prompt=_valid_prompt(request, model),
        priority=request.priority,
        cache_salt=request.cache_salt,
        n=n,
        samplings=_valid_samplings(params, model, n),
        max_tokens=max_tokens,
        min_tokens=params.min_tokens,
        stop=stop,
        include_stop_str_in_output=params.include_stop_str_in_output,
        stop_token_ids=tuple(dict.fromkeys((*eos, *stop_token_ids))),
        skip_special_tokens=(
            params.skip_special_tokens if params.HasField("skip_special_tokens") else True
        ),
        detokenize=detokenize,
        resume=validate_resume(request, model, n=n, max_tokens=max_tokens),
    )


def _valid_prompt(request: inference_pb2.GenerateRequest, model: ModelSpec) -> Prompt:
    kind = request.WhichOneof("prompt")
    if kind == "text":
        if not request.text:
            raise InvalidFieldError("text", "the prompt is empty")
        return TextPrompt(request.text)
    if kind == "token_ids":
        num_ids = len(request.token_ids.ids)
        if not num_ids:
            raise InvalidFieldError("token_ids", "the prompt is empty")
        # Before the ids are looked at: a message may hold millions, and requests wait meanwhile.
        if num_ids >= model.max_model_len:
            raise InvalidFieldError(
                "token_ids",
                f"the prompt has {num_ids} tokens, but at most {model.max_model_len - 1} leave "
                "room for an output token",
            )
        return TokenPrompt(
            _valid_token_ids("token_ids.ids", request.token_ids.ids, model.vocab_size)
        )
    if kind == "chat":
        return valid_chat(request.chat)
    raise InvalidFieldError("prompt", "set one of text, token_ids and chat")


def valid_chat(chat: inference_pb2.ChatMessages) -> ChatPrompt:
    """Checks a conversation. Raises InvalidFieldError."""
    if not chat.messages:
        raise InvalidFieldError("chat.messages", "at least one message is needed")
    if len(chat.messages) > MAX_CHAT_MESSAGES:
        raise InvalidFieldError("chat.messages", f"at most {MAX_CHAT_MESSAGES} messages")
    for index, message in enumerate(chat.messages):
        if not message.role:
            raise InvalidFieldError(f"chat.messages[{index}].role", "must not be empty")
    return ChatPrompt(
        turns=tuple(ChatTurn(message.role, message.content) for message in chat.messages),
        add_generation_prompt=(
            chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
        ),
        template_kwargs_json=chat.template_kwargs_json,
    )


def valid_detokenize_ids(token_ids: Sequence[int], model: ModelSpec, *, max_ids: int) -> list[int]:
    """Checks the ids of a Detokenize call. Raises InvalidFieldError."""
    if len(token_ids) > max_ids:
        raise InvalidFieldError("token_ids", f"at most {max_ids} ids, got {len(token_ids)}")
    return _valid_token_ids("token_ids", token_ids, model.vocab_size)


def _valid_samplings(
    params: inference_pb2.SamplingParams, model: ModelSpec, n: int
) -> tuple[SlotSampling, ...]:
    defaults = model.defaults

    def number(name: str) -> float:
        if not params.HasField(name):
            return getattr(defaults, name)
        value: float = getattr(params, name)
        _check(f"sampling_params.{name}", value, SAMPLING_RANGES[name])
        return value

    temperature = number("temperature")
    top_p = number("top_p")
    top_k = int(number("top_k"))
    min_p = number("min_p")
    _check_range("sampling_params.presence_penalty", params.presence_penalty, -2, 2)
    _check_range("sampling_params.frequency_penalty", params.frequency_penalty, -2, 2)
    repetition_penalty = number("repetition_penalty")
    num_logprobs = params.logprobs if params.HasField("logprobs") else -1
    if params.HasField("logprobs"):
        _check_range("sampling_params.logprobs", num_logprobs, 0, MAX_LOGPROBS)
    logit_bias = _valid_logit_bias(params, model.vocab_size)
    seeds = _seeds(params.seed if params.HasField("seed") else secrets.randbits(62), n)
    return tuple(
        SlotSampling(
            seed=seed,
            temperature=temperature,
            top_k=model.vocab_size if top_k < 1 else min(top_k, model.vocab_size),
            top_p=top_p,
            min_p=min_p,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=repetition_penalty,
            logit_bias=logit_bias,
            num_logprobs=num_logprobs,
        )
        for seed in seeds
    )


def _seeds(seed: int, n: int) -> list[int]:
    """One seed per completion; the first is the request's own, so that n=1 is a prefix of n=2."""
    # The golden ratio's fraction spreads neighbouring seeds and indices over the 64-bit circle.
    spread = [(seed + index * 0x9E3779B97F4A7C15) % 2**64 for index in range(n)]
    return [value - 2**64 if value >= 2**63 else value for value in spread]


def _valid_logit_bias(
    params: inference_pb2.SamplingParams, vocab_size: int
) -> tuple[tuple[int, float], ...]:
    field = "sampling_params.logit_bias"
    if len(params.logit_bias) > MAX_LOGIT_BIASES:
        raise InvalidFieldError(field, f"at most {MAX_LOGIT_BIASES} entries")
    _valid_token_ids(field, list(params.logit_bias), vocab_size)
    for token_id, bias in params.logit_bias.items():
        _check_range(f"{field}[{token_id}]", bias, -100, 100)
    return tuple(sorted(params.logit_bias.items()))


def _valid_stop_strings(stop: Sequence[str]) -> tuple[str, ...]:
    field = "sampling_params.stop"
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidFieldError(field, f"at most {MAX_STOP_STRINGS} strings, got {len(stop)}")
    for index, string in enumerate(stop):
        if not 1 <= len(string) <= MAX_STOP_STRING_CHARS:
            raise InvalidFieldError(
                f"{field}[{index}]", f"must have 1 to {MAX_STOP_STRING_CHARS} characters"
            )
    return tuple(dict.fromkeys(stop))


def _valid_token_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> list[int]:
    ids = list(token_ids)
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        index = next(i for i, token_id in enumerate(ids) if not 0 <= token_id < vocab_size)
        raise InvalidFieldError(
            field,
            f"id {ids[index]} at index {index} is outside the vocabulary [0, {vocab_size})",
        )
    return ids


def _check_range(field: str, value: float, low: float, high: float) -> None:
    _check(field, value, Range(low, high))


def _check(field: str, value: float, allowed: Range) -> None:
    if not allowed.holds(value):
        raise InvalidFieldError(field, f"must be in {allowed}, got {value}")
