"""Log lines of both services: text or JSON, one line for each event whatever its values hold.

A message is constant; what varies goes into fields, so that lines can be searched and counted:

    logger.info("session opened", extra=fields(session_id="5f3a"))
"""

import json
import logging
import queue
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

LogFormat: TypeAlias = Literal["text", "json"]

#: Lines that may wait to be written; about ten seconds of a busy scheduler.
MAX_WAITING_LINES = 10_000
# How long the end of the process waits for a reader of stderr that has stopped reading.
_LAST_LINES_S = 2.0
_RESERVED = frozenset({"ts", "level", "logger", "message", "exception"})


def fields(**values: object) -> dict[str, Any]:
    """What a log call passes as `extra`. A field whose value is None is left out."""
    return {"fields": {name: value for name, value in values.items() if value is not None}}


def start_logging(
    level: str, log_format: LogFormat = "text", *, in_background: bool = False
) -> None:
    """Logs to stderr; stdout is for the lines that scripts wait for.

    Args:
        level: Least severe level to write.
        log_format: Text for people, or JSON, one object a line.
        in_background: Whether a thread formats and writes the lines, so that an event loop never
            waits for whoever reads stderr.
    """
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    if in_background:
        handler = BackgroundHandler(handler)
    logging.basicConfig(level=level.upper(), handlers=[handler])


class TextFormatter(logging.Formatter):
    """`TIME LEVEL LOGGER: MESSAGE name=value ...`; a traceback follows, indented.

    No value can start a line of its own or move the cursor of a terminal: what is not printable is
    escaped as in a Python string.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, and the indented lines of a traceback."""
        words = [
            f"{_timestamp(record)} {record.levelname} {record.name}:",
            _printable(record.getMessage()),
            *(f"{name}={_word(value)}" for name, value in _fields_of(record).items()),
        ]
        exception = _exception_of(self, record)
        traceback = [f"  {_printable(line)}" for line in exception.splitlines()]
        return "\n".join([" ".join(words), *traceback])


class JsonFormatter(logging.Formatter):
    """One JSON object a line, in ASCII: ts, level, logger, message, the fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, object] = {
            "ts": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(
            (name, value) for name, value in _fields_of(record).items() if name not in _RESERVED
        )
        exception = _exception_of(self, record)
        if exception:
            line["exception"] = exception
        return json.dumps(line, default=str)


class BackgroundHandler(logging.Handler):
    """Hands records to another handler on a thread of its own.

    Records wait in a bounded queue. When it is full, because nobody reads, new ones are dropped and
    counted; the count is logged when there is room again.
    """

    def __init__(self, target: logging.Handler, max_waiting: int = MAX_WAITING_LINES) -> None:
        super().__init__()
        self._target = target
        self._records: queue.Queue[logging.LogRecord | None] = queue.Queue(max_waiting)
        self._num_dropped = 0
        self._thread = threading.Thread(target=self._write, name="log writer", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queues a record."""
        try:
            # Made now: what the arguments name may change before the line is written.
            record.msg, record.args = record.getMessage(), None
            self._records.put_nowait(record)
        except queue.Full:
            self._num_dropped += 1
        except Exception:
            # A library's wrong log call must not fail whoever makes it.
            self.handleError(record)

    def close(self) -> None:
        """Writes what waits, as far as that is possible in a moment."""
        if self._thread.is_alive():
            try:
                self._records.put(None, timeout=_LAST_LINES_S)
                self._thread.join(_LAST_LINES_S)
            except queue.Full:
                pass
        super().close()

    def _write(self) -> None:
        while (record := self._records.get()) is not None:
            self._target.handle(record)
            if self._num_dropped and self._records.empty():
                self._write_num_dropped()
        if self._num_dropped:
            self._write_num_dropped()

    def _write_num_dropped(self) -> None:
        self.acquire()
        count, self._num_dropped = self._num_dropped, 0
        self.release()
        record = logging.LogRecord(
            __name__, logging.WARNING, __file__, 0, "log lines were dropped", None, None
        )
        record.fields = {"count": count}
        self._target.handle(record)


def _timestamp(record: logging.LogRecord) -> str:
    """RFC 3339 in UTC with milliseconds."""
    moment = datetime.fromtimestamp(record.created, UTC)
    return f"{moment.replace(tzinfo=None).isoformat(timespec='milliseconds')}Z"


def _fields_of(record: logging.LogRecord) -> Mapping[str, object]:
    found: Mapping[str, object] = getattr(record, "fields", {})
    return found


def _exception_of(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return formatter.formatException(record.exc_info) if record.exc_info else ""


def _word(value: object) -> str:
    """A value as one word, quoted where it could be taken for several."""
    text = str(value)
    if text and not any(char.isspace() or char in '"=\\' for char in text):
        return _printable(text)
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{_printable(escaped)}"'


def _printable(text: str) -> str:
    """The text with everything escaped that is no visible character or space."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
