"""One completion of a request on its way to the client: what was generated, what was sent."""

from dataclasses import dataclass, field

from scheduler_service.errors import InvalidFieldError
from scheduler_service.history import History
from scheduler_service.resume import ReceivedCompletion
from scheduler_service.sequence import FinishReason, Sequence, TokenLogprobs
from scheduler_service.text.detokenizer import IncrementalDetokenizer, StopMatcher

# Most characters by which a client can be ahead of a replay of its tokens: an incomplete character
# of at most four bytes at either end of what was held back.
_MAX_EXCESS_CHARS = 8


@dataclass(frozen=True, slots=True)
class Delta:
    """What a completion produced since the last delta."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0


@dataclass(slots=True)
class Completion:
    """Joins a sequence with its text.

    Text is made when the client is ready for it, many tokens at once if need be. Only sequences
    with stop strings decode every token as it arrives, because the text decides when they end.
    """

    index: int
    seq: Sequence
    # None: the client wants no text.
    detokenizer: IncrementalDetokenizer | None
    stop_matcher: StopMatcher | None
    # Stop strings do not match before this many output tokens.
    min_tokens: int = 0
    include_stop_token: bool = False
    finished_sent: bool = False
    # For metrics, logs and traces; set by the engine.
    first_token_s: float | None = None
    last_token_s: float | None = None
    finished_s: float | None = None
    _num_sent: int = 0
    # Output tokens of an earlier attempt, which came without log-probabilities.
    _num_resumed: int = 0
    # Characters still to come that the client has already.
    _num_excess_chars: int = 0
    _num_detokenized: int = 0
    _text: list[str] = field(default_factory=list)

    @property
    def has_stop_match(self) -> bool:
        """Whether a stop string is complete."""
        return self.stop_matcher is not None and self.stop_matcher.matched is not None

    @property
    def num_generated_tokens(self) -> int:
        """Output tokens that were generated here, without those that it was resumed with."""
        return self.seq.num_output_tokens - self._num_resumed

    def resume(self, received: ReceivedCompletion) -> None:
        """Continues after what the client has, whose tokens are the output of `seq` so far.

        Text is replayed, so that a character or a stop string may lie across the seam. Raises
        InvalidFieldError if the text cannot be that of the tokens.
        """
        num_tokens = self.seq.num_output_tokens
        self._num_sent = self._num_resumed = num_tokens
        if self.detokenizer is not None:
            self._replay(self.detokenizer)
        text = "".join(self._text)
        # Where bytes are no UTF-8, it depends on the pieces when their U+FFFD is shown.
        self._num_excess_chars = max(0, received.num_text_chars - len(text))
        if self._num_excess_chars > _MAX_EXCESS_CHARS:
            raise InvalidFieldError(
                "resume.completions",
                f"completion {self.index} cannot have {received.num_text_chars} characters: its "
                f"{num_tokens} tokens have {len(text)}",
            )
        self._text = [text[received.num_text_chars :]]

    def _replay(self, detokenizer: IncrementalDetokenizer) -> None:
        token_ids = self._new_text_tokens()
        matcher = self.stop_matcher
        if matcher is None:
            self._text.append(detokenizer.push(token_ids))
            return
        # Nothing matched before the token that reached min_tokens.
        split = min(max(0, self.min_tokens - 1), len(token_ids))
        early, late = detokenizer.push(token_ids[:split]), detokenizer.push(token_ids[split:])
        self._text.append(matcher.push(early, may_match=False))
        self._text.append(matcher.push(late))

    def match_stop_strings(self) -> bool:
        """Decodes new tokens if there are stop strings; returns whether one is complete now."""
        if self.stop_matcher is None or self.detokenizer is None:
            return False
        text = self.detokenizer.push(self._new_text_tokens())
        may_match = self.seq.num_output_tokens >= self.min_tokens
        self._text.append(self.stop_matcher.push(text, may_match=may_match))
        return self.stop_matcher.matched is not None

    def note_iterations(self, history: History, progress: list[tuple[int, list[Sequence]]]) -> None:
        """Writes down which iterations made the first and the last token, if they are new.

        `progress` holds the sequences that got a token, by iteration, of one message of results.
        """
        seq = self.seq
        if self.first_token_s is None:
            history.first_iteration = next(number for number, seqs in progress if seq in seqs)
        if seq.is_finished:
            history.last_iteration = next(
                number for number, seqs in reversed(progress) if seq in seqs
            )

    def take_delta(self) -> Delta | None:
        """Everything new, or None. The last delta, and only that, has a finish reason."""
        seq = self.seq
        if self.finished_sent or (seq.num_output_tokens == self._num_sent and not seq.is_finished):
            return None
        start = seq.num_prompt_tokens + self._num_sent
        token_ids = seq.token_ids[start:]
        # Handed over rather than copied: they are most of what an answer takes up.
        logprobs, seq.logprobs = seq.logprobs, []
        self._num_sent = seq.num_output_tokens
        text = self._take_text()
        if not seq.is_finished:
            return Delta(self.index, text, token_ids, logprobs)
        self.finished_sent = True
        return Delta(
            self.index,
            text,
            token_ids,
            logprobs,
            finish_reason=seq.finish_reason,
            stop_reason=self._stop_reason(),
            num_prompt_tokens=seq.num_prompt_tokens,
            num_output_tokens=seq.num_output_tokens,
            num_cached_tokens=seq.num_cached_tokens,
        )

    def _take_text(self) -> str:
        if self.detokenizer is None:
            return ""
        if self.stop_matcher is None:
            self._text.append(self.detokenizer.push(self._new_text_tokens()))
        if self.seq.is_finished:
            self._finish_text(self.detokenizer)
        text = "".join(self._text)
        self._text.clear()
        skipped = text[self._num_excess_chars :]
        self._num_excess_chars -= len(text) - len(skipped)
        return skipped

    def _finish_text(self, detokenizer: IncrementalDetokenizer) -> None:
        if self.stop_matcher is None:
            self._text.append(detokenizer.flush())
        elif self.stop_matcher.matched is None:
            self._text.append(self.stop_matcher.push(detokenizer.flush(), may_match=False))
            self._text.append(self.stop_matcher.flush())

    def _new_text_tokens(self) -> list[int]:
        """Tokens that were not turned into text yet; a stop token has none unless asked for."""
        seq = self.seq
        start = seq.num_prompt_tokens + self._num_detokenized
        self._num_detokenized = seq.num_output_tokens
        token_ids = seq.token_ids[start:]
        if token_ids and self._ended_by_stop_token() and not self.include_stop_token:
            token_ids.pop()
        return token_ids

    def _ended_by_stop_token(self) -> bool:
        return self.seq.finish_reason is FinishReason.STOP and (
            self.stop_matcher is None or self.stop_matcher.matched is None
        )

    def _stop_reason(self) -> str | int | None:
        if self.seq.finish_reason is not FinishReason.STOP:
            return None
        if self.stop_matcher is not None and self.stop_matcher.matched is not None:
            return self.stop_matcher.matched
        return self.seq.token_ids[-1]
