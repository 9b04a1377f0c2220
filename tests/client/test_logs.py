"""Log lines of the services: their form, what cannot forge them, and who never waits for them."""

import json
import logging
import threading
from collections.abc import Callable

import pytest

from nanovllm.logs import BackgroundHandler, JsonFormatter, TextFormatter, fields

LIMIT_S = 30.0
#: Every way to start a line or to steer a terminal that a value may try.
FORGERIES = ["a\nERROR forged", "a\r\nb", "\x1b[2Jgone", "a\u2028b", "a\x85b", "\u202egnp", "a\x7f"]


class Lines(logging.Handler):
    """Keeps what is handed to it."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def emit(self, record: logging.LogRecord) -> None:
        self.go_on.wait(LIMIT_S)
        self.records.append(record)


def record_of(message: str, *args: object, **values: object) -> logging.LogRecord:
    logger = logging.getLogger("nanovllm.test")
    extra = fields(**values)
    return logger.makeRecord(logger.name, logging.INFO, "f.py", 1, message, args, None, extra=extra)


def failed() -> logging.LogRecord:
    try:
        raise ValueError("bad\nINFO forged")
    except ValueError as error:
        record = record_of("it failed")
        record.exc_info = (ValueError, error, error.__traceback__)
        return record


def test_a_text_line_has_time_level_logger_message_and_fields():
    record = record_of("session opened", session_id="5f3a", count=3, ratio=0.5, nothing=None)
    record.created = 1_700_000_000.25
    assert TextFormatter().format(record) == (
        "2023-11-14T22:13:20.250Z INFO nanovllm.test: "
        "session opened session_id=5f3a count=3 ratio=0.5"
    )


def test_a_json_line_is_one_object_with_numbers_as_numbers():
    record = record_of("session opened", session_id="5f3a", count=3, ratio=0.5, nothing=None)
    record.created = 1_700_000_000.25
    assert json.loads(JsonFormatter().format(record)) == {
        "ts": "2023-11-14T22:13:20.250Z",
        "level": "info",
        "logger": "nanovllm.test",
        "message": "session opened",
        "session_id": "5f3a",
        "count": 3,
        "ratio": 0.5,
    }


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
@pytest.mark.parametrize("forgery", FORGERIES)
def test_no_value_and_no_message_starts_a_line_or_steers_a_terminal(formatter, forgery: str):
    line = formatter.format(record_of("refused %s", forgery, request_id=forgery))
    assert line.isprintable()


@pytest.mark.parametrize("value", ["a b", 'say "hi"', "a=b", "", "back\\slash"])
def test_a_text_value_that_could_be_taken_for_several_is_quoted(value: str):
    line = TextFormatter().format(record_of("m", first=value, second=2))
    quoted = line.partition("first=")[2].removesuffix(" second=2")
    assert quoted.startswith('"')
    assert json.loads(quoted) == value


@pytest.mark.parametrize("name", ["ts", "level", "logger", "message", "exception"])
def test_a_field_cannot_take_the_place_of_what_every_json_line_has(name: str):
    honest = json.loads(JsonFormatter().format(record_of("m")))
    record = record_of("m")
    record.fields = {name: "forged"}
    line = json.loads(JsonFormatter().format(record))
    assert line.keys() == honest.keys()
    assert "forged" not in line.values()


def test_a_traceback_is_a_json_field():
    line = JsonFormatter().format(failed())
    assert "\n" not in line
    assert json.loads(line)["exception"].startswith("Traceback (most recent call last)")


def test_the_lines_of_a_traceback_are_indented_whatever_the_error_says():
    first, *rest = TextFormatter().format(failed()).splitlines()
    assert first.endswith("it failed")
    assert any("Traceback" in line for line in rest)
    assert any("forged" in line for line in rest)
    assert all(line.startswith("  ") for line in rest)


@pytest.fixture
def in_background() -> Callable[..., tuple[BackgroundHandler, Lines]]:
    def make(max_waiting: int = 100) -> tuple[BackgroundHandler, Lines]:
        target = Lines()
        return BackgroundHandler(target, max_waiting), target

    return make


def test_lines_written_in_the_background_keep_their_order_and_none_is_lost(in_background):
    handler, target = in_background()
    for number in range(50):
        handler.handle(record_of("line %d", number))
    handler.close()
    assert [record.getMessage() for record in target.records] == [f"line {n}" for n in range(50)]


def test_a_background_line_says_what_was_true_when_it_was_logged(in_background):
    handler, target = in_background()
    target.go_on.clear()
    tokens = [1]
    handler.handle(record_of("tokens %s", tokens))
    tokens.append(2)
    target.go_on.set()
    handler.close()
    assert target.records[0].getMessage() == "tokens [1]"


def test_a_log_call_with_wrong_arguments_fails_nobody(
    in_background, capsys: pytest.CaptureFixture[str]
):
    handler, target = in_background()
    handler.handle(record_of("%d lines", "no number"))
    handler.handle(record_of("%d lines", 2))
    handler.close()
    assert [record.getMessage() for record in target.records] == ["2 lines"]
    assert "no number" in capsys.readouterr().err


def test_a_reader_that_stopped_costs_lines_but_never_blocks_and_is_told_how_many(in_background):
    handler, target = in_background(max_waiting=5)
    target.go_on.clear()
    for number in range(20):
        handler.handle(record_of("line %d", number))  # would hang here
    target.go_on.set()
    handler.close()
    *lines, last = target.records
    # One more may have been taken out of the queue before it was full.
    assert len(lines) in (5, 6)
    assert last.getMessage() == "log lines were dropped"
    assert last.fields == {"count": 20 - len(lines)}
