"""Requests that outlive their stream: what was received, what to send next, and when. Pure.

`Resume` in inference.proto says what the server makes of it.
"""

import random
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from nanovllm.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    NanovllmError,
    OverloadedError,
    RequestCancelledError,
    UnavailableError,
)
from nanovllm.v1 import inference_pb2 as pb

#: What the server refuses if it cannot continue another server's stream.
_FINGERPRINT_FIELD = "resume.model_fingerprint"


@dataclass(frozen=True, slots=True)
class ResumePolicy:
    """How long and how often a request whose stream broke is sent again.

    The pause doubles from one attempt to the next and starts anew with every response, less up to
    half of it at random, so that clients that lost the same server do not come back together.
    """

    #: Seconds without any response after which the last error is raised.
    max_wait_s: float = 60.0
    #: First and longest pause between two attempts, in seconds.
    initial_backoff_s: float = 0.1
    max_backoff_s: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.initial_backoff_s <= self.max_backoff_s or self.max_wait_s < 0:
            raise ValueError("need 0 <= initial_backoff_s <= max_backoff_s and 0 <= max_wait_s")


#: Starts a call; takes the request and a limit in seconds or None.
GenerateCall: TypeAlias = Callable[[pb.GenerateRequest, float | None], Any]


@dataclass(slots=True)
class Server:
    """One of the schedulers that a client may use, shared by its requests."""

    address: str
    generate: GenerateCall
    #: Attempts that ended without a response since the last response.
    num_failures: int = 0


def resume_policy(resume: bool | ResumePolicy) -> ResumePolicy | None:
    """Returns the policy that a `resume` argument asks for; None: not to resume."""
    if isinstance(resume, ResumePolicy):
        return resume
    return ResumePolicy() if resume else None


@dataclass(slots=True)
class _Received:
    """What came of one completion."""

    token_ids: list[int] = field(default_factory=list)
    num_text_chars: int = 0
    is_finished: bool = False


class ResumableRequest:
    """A request and what was received of it, over all attempts.

    It gets a seed if it has none, because a server that did not begin a completion can only go on
    with it if it knows its seed.
    """

    def __init__(
        self,
        request: pb.GenerateRequest,
        policy: ResumePolicy,
        *,
        deadline_s: float | None = None,
        num_servers: int = 1,
        rng: random.Random | None = None,
    ) -> None:
        """Prepares the first attempt.

        Args:
            request: As it would be sent if it were not resumable; not changed.
            policy: When to try again.
            deadline_s: Time on the clock of the callers at which the request is over.
            num_servers: Servers to choose from.
            rng: Source of the jitter.
        """
        self._request = pb.GenerateRequest()
        self._request.CopyFrom(request)
        self._request.resume.key = secrets.randbits(64) or 1
        params = self._request.sampling_params
        if not params.HasField("seed"):
            params.seed = secrets.randbits(62)
        self._num_completions = params.n if params.HasField("n") else 1
        self._policy = policy
        self._num_servers = num_servers
        self._rng = rng or random.Random()
        self._received: dict[int, _Received] = {}
        self._info: pb.ResumeInfo | None = None
        self._num_failures = 0
        self._num_resumes = 0
        self._is_resuming = False
        self._failing_since_s: float | None = None
        self._deadline_s = deadline_s
        self._server: Server | None = None

    @property
    def request_id(self) -> str:
        """Names the request in every attempt."""
        return self._request.request_id

    @property
    def num_resumes(self) -> int:
        """Attempts that continued what an earlier one had begun."""
        return self._num_resumes

    @property
    def is_complete(self) -> bool:
        """Whether the end of every completion was received; how the stream ends is no matter."""
        return len(self._received) == self._num_completions and all(
            item.is_finished for item in self._received.values()
        )

    def choose(self, servers: Sequence[Server]) -> Server:
        """The server of the next attempt: the one that failed least, the first of equals."""
        self._server = min(servers, key=lambda server: server.num_failures)
        return self._server

    def remaining_s(self, now_s: float) -> float | None:
        """Time that is left; None: no limit."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - now_s)

    def message(self) -> pb.GenerateRequest:
        """What the next attempt sends."""
        message = pb.GenerateRequest()
        message.CopyFrom(self._request)
        if self._info is None:
            return message
        if not message.HasField("token_ids"):
            message.token_ids.ids.extend(self._info.prompt_token_ids)
        message.resume.model_fingerprint = self._info.model_fingerprint
        for index, item in sorted(self._received.items()):
            message.resume.completions.add(
                index=index,
                token_ids=() if item.is_finished else item.token_ids,
                num_text_chars=0 if item.is_finished else item.num_text_chars,
                is_finished=item.is_finished,
            )
        return message

    def receive(self, response: pb.GenerateResponse) -> None:
        """Takes note of a response."""
        self._num_failures = 0
        self._failing_since_s = None
        self._num_resumes += self._is_resuming
        self._is_resuming = False
        if self._server is not None:
            self._server.num_failures = 0
        if self._info is None and response.HasField("resume_info"):
            self._info = response.resume_info
        item = self._received.setdefault(response.index, _Received())
        item.token_ids.extend(response.token_ids)
        item.num_text_chars += len(response.text)
        item.is_finished = response.finish_reason != pb.FINISH_REASON_UNSPECIFIED

    def pause_s(self, error: NanovllmError, now_s: float) -> float:
        """How long to wait before the next attempt, after one that ended in `error`.

        Raises:
            NanovllmError: `error` itself if another attempt is of no use.
            DeadlineExceededError: There is no time for another attempt.
        """
        if not self._may_help(error):
            raise error
        since_s = now_s if self._failing_since_s is None else self._failing_since_s
        if now_s - since_s > self._policy.max_wait_s:
            raise error
        self._failing_since_s = since_s
        policy = self._policy
        # No float overflows, however many attempts fail.
        doublings = min(self._num_failures, 60)
        backoff_s = min(policy.initial_backoff_s * 2.0**doublings, policy.max_backoff_s)
        backoff_s *= self._rng.uniform(0.5, 1.0)
        if isinstance(error, OverloadedError):
            backoff_s = max(backoff_s, error.retry_after_s)
        if self._deadline_s is not None and now_s + backoff_s >= self._deadline_s:
            raise DeadlineExceededError(
                f"no time is left to resume the request, which had ended with: {error}", error.code
            ) from error
        self._num_failures += 1
        self._is_resuming = bool(self._received)
        if self._server is not None:
            self._server.num_failures += 1
        return backoff_s

    def _may_help(self, error: NanovllmError) -> bool:
        if self._received and self._info is None:
            return False  # the server knows nothing of resuming
        match error:
            case UnavailableError() | RequestCancelledError():
                return True
            case OverloadedError():
                # A request that was never let in is its caller's to send again.
                return bool(self._received) or self._num_failures > 0
            case InvalidRequestError(fields=fields):
                # The one at fault is the server; another one may be of the right model.
                return _FINGERPRINT_FIELD in fields and self._num_servers > 1
            case _:
                return False
