"""Token ids to text, piece by piece: character boundaries and stop strings. Pure."""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
# A character has at most four bytes, so at most three tokens can be an incomplete one.
_MAX_INCOMPLETE_TOKENS = 3

Decode = Callable[[Sequence[int]], str]


class IncrementalDetokenizer:
    """Turns a growing list of ids into text that only ever grows by whole characters.

    A token's text can depend on the tokens before it (a leading space, say), so every piece is the
    difference of two decodes of a window that starts at the same earlier token.
    """

    # Enough left context for any tokenizer in use.
    _CONTEXT_TOKENS = 6
    # Output without a single whole character must not make the window grow for ever.
    _MAX_CONTEXT_TOKENS = 64

    def __init__(self, decode: Decode, prompt_token_ids: Sequence[int]) -> None:
        self._decode = decode
        # Starts between two characters. A tokenizer with byte fallback decodes a run of byte tokens
        # as a whole: one that starts within a character is lost altogether.
        self._window: list[int] = []
        for further in range(_MAX_INCOMPLETE_TOKENS + 1):
            self._window = list(prompt_token_ids[-self._CONTEXT_TOKENS - further :])
            text = self._decode(self._window)
            if not text.startswith(_REPLACEMENT):
                break
        # Characters of the window's text that were returned or belong to the prompt.
        self._num_shown = len(text)
        # Leading ids of the window that those characters stand for.
        self._done = len(self._window)
        # Where the window may start next.
        self._next_start = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes in new ids and returns the text that is certain now."""
        self._window.extend(token_ids)
        end = len(self._window)
        for incomplete in range(min(_MAX_INCOMPLETE_TOKENS, end - self._done) + 1):
            text = self._decode(self._window[: end - incomplete])
            if not text.endswith(_REPLACEMENT):
                return self._emit(text, end - incomplete, num_held=0)
        if end - self._done > _MAX_INCOMPLETE_TOKENS:
            # These bytes are no UTF-8, whatever follows; only the last may begin a character.
            return self._emit(self._decode(self._window), end, num_held=1)
        return ""

    def flush(self) -> str:
        """Returns what is left, an incomplete character as U+FFFD."""
        return self._emit(self._decode(self._window), len(self._window), num_held=0)

    def _emit(self, text: str, done: int, *, num_held: int) -> str:
        """Returns the new part of the window's text and moves the window towards its end."""
        piece = text[self._num_shown : len(text) - num_held]
        self._num_shown = len(text) - num_held
        self._done = done
        if done - self._next_start < self._CONTEXT_TOKENS:
            return piece
        if num_held and done > self._MAX_CONTEXT_TOKENS:
            self._next_start = done - self._CONTEXT_TOKENS
        elif num_held:
            return piece
        if self._next_start:
            del self._window[: self._next_start]
            self._done -= self._next_start
            self._num_shown = len(self._decode(self._window[: self._done])) - num_held
        self._next_start = self._done
        return piece


class StopMatcher:
    """Finds stop strings in text that arrives in pieces.

    The match that is complete first counts, the longer one of two that end together; so the result
    does not depend on how the text is cut. Text that may yet become a stop string is held back.
    """

    def __init__(self, stop_strings: Sequence[str], *, include_in_output: bool) -> None:
        self._stop_strings = tuple(stop_strings)
        self._include_in_output = include_in_output
        self._first_characters = frozenset(stop[0] for stop in self._stop_strings)
        self._max_held = max(map(len, self._stop_strings)) - 1
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, *, may_match: bool = True) -> str:
        """Takes in text and returns what may be shown. Sets `matched` if a stop string ends in it.

        With `may_match` false (min_tokens not reached) nothing matches, but text is held back so
        that a match can still begin in it.
        """
        num_held = len(self._held)
        text = self._held + text
        if may_match:
            # A stop string that lies in the held text alone was complete too early to count.
            found = [
                (start + len(stop), start, stop)
                for stop in self._stop_strings
                if (start := text.find(stop, max(0, num_held - len(stop) + 1))) >= 0
            ]
            if found:
                end, start, self.matched = min(found)
                self._held = ""
                return text[: end if self._include_in_output else start]
        keep = self._possible_start(text)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """Returns what was held back; the completion ended without a match."""
        text, self._held = self._held, ""
        return text

    def _possible_start(self, text: str) -> int:
        """Index of the earliest suffix of `text` that a longer stop string starts with."""
        for index in range(max(0, len(text) - self._max_held), len(text)):
            if text[index] not in self._first_characters:
                continue
            suffix = text[index:]
            if any(
                len(stop) > len(suffix) and stop.startswith(suffix) for stop in self._stop_strings
            ):
                return index
        return len(text)
