"""Token ids to text, piece by piece: character boundaries and stop strings. Pure."""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
# A character has at most four bytes, so at most three tokens can be an incomplete one.
_MAX_INCOMPLETE_TOKENS = 3

Decode = Callable[[Sequence[int]], str]


class IncrementalDetokenizer:
    """Turns a growing list of ids into text that only ever grows by whole characters.

    A token's text can depend on the tokens before it (a leading space, say), so every piece is the
    difference of two decodes that start at the same earlier token.
    """

    # Enough left context for any tokenizer in use.
    _CONTEXT_TOKENS = 6

    def __init__(self, decode: Decode, prompt_token_ids: Sequence[int]) -> None:
        self._decode = decode
        # Ids of the decoding window; those before `_done` are in the text already.
        self._window = list(prompt_token_ids[-self._CONTEXT_TOKENS :])
        self._done = len(self._window)

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes in new ids and returns the text that is certain now."""
        self._window.extend(token_ids)
        before = self._decode(self._window[: self._done])
        end = len(self._window)
        for incomplete in range(min(_MAX_INCOMPLETE_TOKENS, end - self._done) + 1):
            text = self._decode(self._window[: end - incomplete])
            if not text.endswith(_REPLACEMENT):
                return self._emit(before, text, end - incomplete)
        if end - self._done > _MAX_INCOMPLETE_TOKENS:
            # No valid UTF-8 comes out of this any more.
            return self._emit(before, self._decode(self._window), end)
        return ""

    def flush(self) -> str:
        """Returns what is left, an incomplete character as U+FFFD."""
        before = self._decode(self._window[: self._done])
        return self._emit(before, self._decode(self._window), len(self._window))

    def _emit(self, before: str, text: str, done: int) -> str:
        if done == self._done:
            return ""
        drop = max(0, self._done - self._CONTEXT_TOKENS)
        self._window = self._window[drop:]
        self._done = done - drop
        return text[len(before) :]


class StopMatcher:
    """Finds stop strings in text that arrives in pieces.

    Text that may yet become a stop string is held back.
    """

    def __init__(self, stop_strings: Sequence[str], *, include_in_output: bool) -> None:
        self._stop_strings = tuple(stop_strings)
        self._include_in_output = include_in_output
        self._max_held = max(map(len, self._stop_strings)) - 1
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, *, may_match: bool = True) -> str:
        """Takes in text and returns what may be shown. Sets `matched` on the earliest match.

        With `may_match` false (min_tokens not reached) nothing matches, but text is held back so
        that a match can still begin in it.
        """
        text = self._held + text
        if may_match:
            found = [
                (position, stop)
                for stop in self._stop_strings
                if (position := text.find(stop)) >= 0
            ]
            if found:
                position, self.matched = min(found)
                self._held = ""
                return text[: position + (len(self.matched) if self._include_in_output else 0)]
        keep = self._possible_start(text)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """Returns what was held back; the completion ended without a match."""
        text, self._held = self._held, ""
        return text

    def _possible_start(self, text: str) -> int:
        """Index of the earliest suffix of `text` that some stop string starts with."""
        for index in range(max(0, len(text) - self._max_held), len(text)):
            suffix = text[index:]
            if any(stop.startswith(suffix) for stop in self._stop_strings):
                return index
        return len(text)
