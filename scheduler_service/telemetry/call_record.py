"""What is known of a Generate call once it is over: the source of its log line and its trace."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from google.rpc import code_pb2

from scheduler_service.access.caller import Caller
from scheduler_service.completion import Completion, Delta
from scheduler_service.errors import RequestError
from scheduler_service.live_request import LiveRequest
from scheduler_service.validation import MAX_REQUEST_ID_CHARS, GenerateSpec

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]

GENERATE = "nanovllm.v1.InferenceService/Generate"
GENERATE_MANY = "nanovllm.v1.InferenceService/GenerateMany"

OK = "OK"
CANCELLED = "CANCELLED"
DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
INTERNAL = "INTERNAL"

#: Bound on a prompt in a log line, and on all outputs of a request together, in characters.
MAX_LOGGED_CHARS = 2048


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a request's life; times of `time.monotonic()`."""

    name: str
    start_s: float
    end_s: float


@dataclass(slots=True)
class CallRecord:
    """Filled in while the call goes on. Times are those of `time.monotonic()`."""

    arrived_s: float
    caller: Caller
    # As the client gave it; whatever it may be.
    request_id: str
    # May hold the caller's token, which must not get into a log with the record.
    metadata: Metadata = field(default=(), repr=False)
    # Full name of the gRPC method.
    method: str = GENERATE
    # Whether traces want to know what happens to the sequences.
    keeps_history: bool = False
    spec: GenerateSpec | None = None
    live: LiveRequest | None = None
    error: RequestError | None = None
    # Name of the gRPC status.
    code: str = OK
    ended_s: float = 0.0
    # Only where prompts and outputs are logged.
    texts: "OutputTexts | None" = None

    @property
    def was_queued(self) -> bool:
        """Whether the request got in; else it was refused, or left by its caller before that."""
        return self.live is not None

    @property
    def is_refused(self) -> bool:
        """Whether the request was turned away before it was queued."""
        return self.live is None and self.error is not None

    @property
    def completions(self) -> list[Completion]:
        """None of a refused request."""
        return self.live.completions if self.live is not None else []

    @property
    def first_token_s(self) -> float | None:
        """When the first token of any completion arrived."""
        return min((c.first_token_s for c in self.completions if c.first_token_s), default=None)

    def begin(self, live: LiveRequest) -> None:
        """The request is queued. To be called before anything can happen to it."""
        self.live = live
        self.request_id = live.request_id
        if self.keeps_history:
            live.keep_history()

    def fail(self, error: RequestError) -> None:
        """The call ends with the status of an error."""
        self.error = error
        self.code = code_pb2.Code.Name(error.code)

    def shown_request_id(self) -> str:
        """The id, cut to the length of valid ones."""
        return self.request_id[:MAX_REQUEST_ID_CHARS]

    def phases(self) -> list[Phase]:
        """The phases of the request as a whole: those of its earliest completion."""
        admitted = [c.seq.first_admitted_s for c in self.completions if c.seq.first_admitted_s]
        return list(
            _phases(self.arrived_s, min(admitted, default=None), self.first_token_s, self.ended_s)
        )

    def phases_of(self, completion: Completion) -> list[Phase]:
        """The phases that one completion went through, back to back, within the call."""
        seq = completion.seq
        return list(
            _phases(
                max(self.arrived_s, seq.arrival_s),
                seq.first_admitted_s,
                completion.first_token_s,
                min(self.ended_s, completion.finished_s or self.ended_s),
            )
        )


def _phases(
    start_s: float, admitted_s: float | None, first_token_s: float | None, end_s: float
) -> Iterator[Phase]:
    if admitted_s is None:
        yield Phase("queue", start_s, end_s)
        return
    yield Phase("queue", start_s, admitted_s)
    if first_token_s is None:
        yield Phase("prefill", admitted_s, end_s)
        return
    yield Phase("prefill", admitted_s, first_token_s)
    yield Phase("decode", first_token_s, max(first_token_s, end_s))


@dataclass(slots=True)
class OutputTexts:
    """The beginnings of a request's outputs."""

    _parts: dict[int, list[str]] = field(default_factory=dict)
    _num_chars: int = 0

    def add(self, delta: Delta) -> None:
        """Takes in what a delta adds, as long as there is room."""
        room = MAX_LOGGED_CHARS - self._num_chars
        if room >= 0 and delta.text:
            # One character more than there is room for shows that there was more.
            part = delta.text[: room + 1]
            self._num_chars += len(part)
            self._parts.setdefault(delta.index, []).append(part)

    def shown(self) -> Any:
        """The text of the only completion, or a list in the order of index."""
        texts = ["".join(self._parts[index]) for index in sorted(self._parts)]
        if self._num_chars > MAX_LOGGED_CHARS:
            texts.append("...")
        return "".join(texts) if len(self._parts) <= 1 else texts
