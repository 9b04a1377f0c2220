"""What a request returns: deltas while it streams, completions when it is done."""

from dataclasses import dataclass
from enum import StrEnum

from nanovllm.errors import ServerError
from nanovllm.v1 import inference_pb2 as pb


class FinishReason(StrEnum):
    """Why a completion ended."""

    #: An end-of-sequence token, a stop token or a stop string.
    STOP = "stop"
    #: `max_tokens` or the model's length was reached.
    LENGTH = "length"
    #: The request was aborted.
    ABORT = "abort"
    #: The server failed.
    ERROR = "error"


_FINISH_REASONS: dict[int, FinishReason] = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_ABORT: FinishReason.ABORT,
    pb.FINISH_REASON_ERROR: FinishReason.ERROR,
}


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities of one generated token."""

    #: Of the chosen token.
    logprob: float
    #: The most probable token ids, most probable first, and their log-probabilities.
    top_token_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one completion."""

    prompt_tokens: int
    completion_tokens: int
    #: Prompt tokens found in the prefix cache.
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What one completion produced since the last delta of the same index."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    #: One entry per token id if log-probabilities were asked for, else empty.
    logprobs: tuple[TokenLogprobs, ...]
    #: Set on the last delta of this index only, like `usage`.
    finish_reason: FinishReason | None
    #: The stop string or token id that matched.
    stop_reason: str | int | None
    usage: Usage | None

    @classmethod
    def from_proto(cls, message: pb.GenerateResponse) -> "Delta":
        """Returns the value of a message."""
        finish_reason = _FINISH_REASONS.get(message.finish_reason)
        return cls(
            request_id=message.request_id,
            index=message.index,
            text=message.text,
            token_ids=tuple(message.token_ids),
            logprobs=tuple(
                TokenLogprobs(entry.logprob, tuple(entry.top_token_ids), tuple(entry.top_logprobs))
                for entry in message.logprobs
            ),
            finish_reason=finish_reason,
            stop_reason=_stop_reason(message.stop_reason) if finish_reason else None,
            usage=_usage(message.usage) if message.HasField("usage") else None,
        )


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished completion."""

    index: int
    text: str
    token_ids: list[int]
    #: One entry per token id, or None if log-probabilities were not asked for.
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    usage: Usage


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """Everything that a request returned; the short properties speak of its first completion."""

    request_id: str
    #: One per index, in order.
    completions: tuple[Completion, ...]
    #: The prompt's ids if it was given as ids, else None.
    prompt_token_ids: list[int] | None = None

    @property
    def outputs(self) -> tuple[Completion, ...]:
        """The completions, under the name that vLLM gives them."""
        return self.completions

    @property
    def text(self) -> str:
        """Text of the first completion."""
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        """Generated token ids of the first completion."""
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first completion ended."""
        return self.completions[0].finish_reason

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.completions[0].usage.prompt_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that the first completion found in the prefix cache."""
        return self.completions[0].usage.cached_tokens

    @property
    def num_generated_tokens(self) -> int:
        """Generated tokens of all completions."""
        return sum(len(completion.token_ids) for completion in self.completions)


class OutputFolder:
    """Folds the deltas of one request into its output."""

    def __init__(self, request: pb.GenerateRequest) -> None:
        params = request.sampling_params
        self._num_completions = params.n if params.HasField("n") else 1
        self._prompt_token_ids = (
            list(request.token_ids.ids) if request.HasField("token_ids") else None
        )
        self._request_id = request.request_id
        self._parts: dict[int, list[Delta]] = {}

    def add(self, delta: Delta) -> None:
        """Takes the next delta.

        Raises:
            ServerError: The request has no completion of this index, or it has ended already.
        """
        if not 0 <= delta.index < self._num_completions:
            raise ServerError(
                f"the server sent completion {delta.index} of a request for {self._num_completions}"
            )
        parts = self._parts.setdefault(delta.index, [])
        if parts and parts[-1].finish_reason is not None:
            raise ServerError(f"the server went on with completion {delta.index} after its end")
        parts.append(delta)

    def output(self) -> RequestOutput:
        """Returns the output.

        Raises:
            ServerError: A completion has not ended.
        """
        completions = tuple(self._completion(index) for index in range(self._num_completions))
        return RequestOutput(self._request_id, completions, self._prompt_token_ids)

    def _completion(self, index: int) -> Completion:
        parts = self._parts.get(index, [])
        last = parts[-1] if parts else None
        if last is None or last.finish_reason is None or last.usage is None:
            raise ServerError(f"the stream ended before completion {index} did")
        logprobs = [entry for part in parts for entry in part.logprobs]
        return Completion(
            index=index,
            text="".join(part.text for part in parts),
            token_ids=[token_id for part in parts for token_id in part.token_ids],
            logprobs=logprobs or None,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            usage=last.usage,
        )


def _stop_reason(message: pb.StopReason) -> str | int | None:
    match message.WhichOneof("reason"):
        case "stop_string":
            return message.stop_string
        case "token_id":
            return message.token_id
        case _:
            return None


def _usage(message: pb.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.completion_tokens, message.cached_tokens)
