"""Requests that go on where a broken stream ended; the meaning of each field is in inference.proto.

Pure checks; `Completion.resume` and `Engine.submit` do the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nanovllm.v1 import inference_pb2
from scheduler_service.errors import InvalidFieldError
from scheduler_service.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class ReceivedCompletion:
    """What a client has of one completion."""

    token_ids: tuple[int, ...]
    num_text_chars: int
    is_finished: bool


@dataclass(frozen=True, slots=True)
class ResumeSpec:
    """A valid `resume` field."""

    # Known to the client alone; proves that a live request of the same id is the same request.
    key: int
    # By index.
    received: dict[int, ReceivedCompletion]

    def is_same_request(self, other: "ResumeSpec | None") -> bool:
        """Whether both are attempts of one request."""
        return other is not None and self.key == other.key


def validate_resume(
    request: inference_pb2.GenerateRequest, model: ModelSpec, *, n: int, max_tokens: int | None
) -> ResumeSpec | None:
    """Checks the field; None if it is not set. Raises InvalidFieldError."""
    if not request.HasField("resume"):
        return None
    resume = request.resume
    if not resume.key:
        raise InvalidFieldError("resume.key", "must be a random number other than 0")
    if resume.model_fingerprint and resume.model_fingerprint != model.fingerprint:
        raise InvalidFieldError(
            "resume.model_fingerprint",
            f"the stream began at a server of another model (fingerprint "
            f"{resume.model_fingerprint[:12]}, this one serves {model.name!r}, fingerprint "
            f"{model.fingerprint[:12]}); resume it at a server of that model",
        )
    if len(resume.completions) > n:
        raise InvalidFieldError("resume.completions", f"at most n = {n} entries")
    if resume.completions:
        _check_repeatable(request)
    longest = model.max_model_len - len(request.token_ids.ids) - 1
    if max_tokens is not None:
        longest = min(longest, max_tokens - 1)
    received: dict[int, ReceivedCompletion] = {}
    for position, item in enumerate(resume.completions):
        field = f"resume.completions[{position}]"
        if not 0 <= item.index < n or item.index in received:
            raise InvalidFieldError(f"{field}.index", f"must be in [0, {n}) and not repeated")
        received[item.index] = _valid_received(field, item, model, longest)
    if len(received) == n and all(item.is_finished for item in received.values()):
        raise InvalidFieldError("resume.completions", "nothing is left: every completion ended")
    return ResumeSpec(resume.key, received)


def _check_repeatable(request: inference_pb2.GenerateRequest) -> None:
    """What was received only continues if the rest of the request is the same for every server."""
    if not request.resume.model_fingerprint:
        raise InvalidFieldError("resume.model_fingerprint", "must be set with completions")
    if not request.HasField("token_ids"):
        raise InvalidFieldError("prompt", "a request with resume.completions needs token_ids")
    if not request.sampling_params.HasField("seed"):
        raise InvalidFieldError(
            "sampling_params.seed", "a request with resume.completions needs its first seed"
        )


def _valid_received(
    field: str, item: inference_pb2.ReceivedCompletion, model: ModelSpec, longest: int
) -> ReceivedCompletion:
    if item.num_text_chars < 0:
        raise InvalidFieldError(f"{field}.num_text_chars", "must not be negative")
    if item.is_finished:
        return ReceivedCompletion((), 0, is_finished=True)
    # Before the ids are looked at; a message may hold millions.
    if len(item.token_ids) > longest:
        raise InvalidFieldError(
            f"{field}.token_ids",
            f"{len(item.token_ids)} ids leave no room for another; at most {longest} do",
        )
    token_ids: Sequence[int] = item.token_ids
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < model.vocab_size:
        raise InvalidFieldError(
            f"{field}.token_ids", f"an id is outside the vocabulary [0, {model.vocab_size})"
        )
    return ReceivedCompletion(tuple(token_ids), item.num_text_chars, is_finished=False)
