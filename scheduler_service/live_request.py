"""A request while it is live, and how it is made from what was asked for."""

import asyncio
import itertools
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from scheduler_service.admission import Ticket
from scheduler_service.completion import Completion
from scheduler_service.errors import RequestError
from scheduler_service.history import History
from scheduler_service.lengths import SequenceLengths
from scheduler_service.reservation import Reservation
from scheduler_service.resume import ResumeSpec
from scheduler_service.sequence import Sequence, SequenceId
from scheduler_service.text.detokenizer import IncrementalDetokenizer, StopMatcher
from scheduler_service.text.tokenizer import Tokenizer
from scheduler_service.validation import GenerateSpec, RequestKey


class RequestGroup:
    """Requests that are answered together, in one call; told of changes in their place."""

    def __init__(self) -> None:
        self.is_queued = False
        self.changed = asyncio.Event()
        # Of those that have changed, in the order in which they did.
        self._requests: OrderedDict[LiveRequest, None] = OrderedDict()

    def note(self, request: "LiveRequest") -> None:
        """A request of the group may have something to send."""
        self._requests[request] = None

    def take(self) -> "LiveRequest | None":
        """The request that has waited longest since it changed; None: none has."""
        if not self._requests:
            return None
        request, _ = self._requests.popitem(last=False)
        return request

    def forget(self, request: "LiveRequest") -> None:
        """A request has left the group."""
        self._requests.pop(request, None)


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A request from submission to its last delta."""

    key: RequestKey
    completions: list[Completion]
    # As asked for, per completion; None: as many as fit.
    max_tokens: int | None
    ticket: Ticket
    # Set if another call may continue it.
    resume: ResumeSpec | None = None
    # Whether the request waits to be told of a change.
    is_queued: bool = False
    # Set when a completion may have a new delta, or the request failed.
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    # Told instead of the request itself, if it is answered together with others.
    group: RequestGroup | None = None
    error: RequestError | None = None

    @property
    def request_id(self) -> str:
        """The id that its owner knows it by."""
        return self.key.request_id

    @property
    def is_finished(self) -> bool:
        """Whether every completion ended; their last deltas may still have to be written."""
        return all(completion.seq.is_finished for completion in self.completions)

    @property
    def is_answered(self) -> bool:
        """Whether the last delta of every completion was taken."""
        return all(completion.finished_sent for completion in self.completions)

    def keep_history(self) -> None:
        """Has everything that happens to the sequences written down, for a trace."""
        for completion in self.completions:
            completion.seq.history = History()


class RequestFactory:
    """Makes the sequences and completions of requests; their ids are never used again."""

    def __init__(self, tokenizer: Tokenizer, lengths: SequenceLengths) -> None:
        self._tokenizer = tokenizer
        self._lengths = lengths
        self._sequence_ids = map(SequenceId, itertools.count())

    def sequences(
        self, reservation: Reservation, prompt_token_ids: list[int]
    ) -> dict[int, Sequence]:
        """Sequences by index, of the completions that are not finished yet."""
        spec = reservation.spec
        received = spec.resume.received if spec.resume is not None else {}
        num_prompt = len(prompt_token_ids)
        max_total = self._lengths.max_total_tokens(num_prompt, spec.max_tokens)
        queued_s = time.monotonic()
        return {
            index: Sequence(
                next(self._sequence_ids),
                prompt_token_ids,
                output_token_ids=received[index].token_ids if index in received else (),
                max_total_tokens=max_total,
                min_total_tokens=num_prompt + spec.min_tokens,
                sampling=sampling,
                stop_token_ids=spec.stop_token_ids,
                priority=spec.priority,
                arrival_s=reservation.arrival_s,
                queued_s=queued_s,
                cache_salt=spec.cache_salt,
            )
            for index, sampling in enumerate(spec.samplings)
            if index not in received or not received[index].is_finished
        }

    def request(self, reservation: Reservation, seqs: dict[int, Sequence]) -> LiveRequest:
        """A request that takes over the reservation's ticket; `seqs` are its own, by index.

        Raises InvalidFieldError if it resumes text that cannot be that of its tokens.
        """
        spec = reservation.spec
        return LiveRequest(
            spec.key,
            [self._completion(spec, index, seq) for index, seq in seqs.items()],
            spec.max_tokens,
            reservation.ticket,
            spec.resume,
        )

    def _completion(self, spec: GenerateSpec, index: int, seq: Sequence) -> Completion:
        detokenizer = None
        if spec.detokenize:
            skip = spec.skip_special_tokens
            detokenizer = IncrementalDetokenizer(
                lambda ids: self._tokenizer.decode(ids, skip_special_tokens=skip),
                seq.token_ids[: seq.num_prompt_tokens],
            )
        matcher = None
        if spec.stop:
            matcher = StopMatcher(spec.stop, include_in_output=spec.include_stop_str_in_output)
        completion = Completion(
            index,
            seq,
            detokenizer,
            matcher,
            min_tokens=spec.min_tokens,
            include_stop_token=spec.include_stop_str_in_output,
        )
        if spec.resume is not None and index in spec.resume.received:
            completion.resume(spec.resume.received[index])
        return completion
