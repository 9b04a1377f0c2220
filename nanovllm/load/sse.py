"""Server-sent events, as far as streams of completions use them.

https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

import re

_LINE_END = re.compile(rb"\r\n|\n|\r")


class SseDecoder:
    """Turns the bytes of an event stream into the data of its events."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, data: bytes) -> list[str]:
        """Takes the next bytes; returns the data of the events that they complete."""
        events = []
        buffer, held = self._rest + data, b""
        if buffer.endswith(b"\r"):
            # It may be half of a line's end; the next bytes will tell.
            buffer, held = buffer[:-1], b"\r"
        *lines, rest = _LINE_END.split(buffer)
        self._rest = rest + held
        for line in lines:
            if not line:
                if self._data:
                    events.append("\n".join(self._data))
                self._data = []
                continue
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" ").decode("utf-8", "replace"))
        return events
