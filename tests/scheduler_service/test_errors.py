"""Every error reaches the client as one code with details that a program can read."""

import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2

from scheduler_service import errors
from scheduler_service.errors import (
    DeadlineError,
    DuplicateRequestError,
    ExecutorFailedError,
    InvalidFieldError,
    NeverFitsError,
    NoExecutorError,
    QueueFullError,
    RequestError,
    to_status,
)


def status_of(error: RequestError) -> status_pb2.Status:
    ((key, value),) = to_status(error).trailing_metadata
    assert key == "grpc-status-details-bin"
    return status_pb2.Status.FromString(value)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidFieldError("text", "the prompt is empty"), code_pb2.INVALID_ARGUMENT),
        (DuplicateRequestError("twice"), code_pb2.ALREADY_EXISTS),
        (QueueFullError("full", 1.0), code_pb2.RESOURCE_EXHAUSTED),
        (NeverFitsError("too large"), code_pb2.RESOURCE_EXHAUSTED),
        (DeadlineError("late"), code_pb2.DEADLINE_EXCEEDED),
        (NoExecutorError("nobody there", 1.0), code_pb2.UNAVAILABLE),
        (ExecutorFailedError("lost"), code_pb2.INTERNAL),
    ],
)
def test_each_error_has_its_code_and_its_message(error: RequestError, code: int):
    status = to_status(error)
    assert status.code.value[0] == code
    assert status.details == str(error)
    assert status_of(error).message == str(error)


def test_an_invalid_field_is_named_in_the_details():
    (detail,) = status_of(InvalidFieldError("sampling_params.n", "must be in [1, 64]")).details
    bad_request = error_details_pb2.BadRequest()
    assert detail.Unpack(bad_request)
    (violation,) = bad_request.field_violations
    assert (violation.field, violation.description) == ("sampling_params.n", "must be in [1, 64]")


def test_a_retryable_error_says_when_to_come_back():
    (detail,) = status_of(QueueFullError("full", 1.5)).details
    retry = error_details_pb2.RetryInfo()
    assert detail.Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1500


def test_a_request_that_can_never_fit_is_not_told_to_come_back():
    assert list(status_of(NeverFitsError("too large")).details) == []


def test_labels_for_metrics_are_distinct():
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, RequestError) and "label" in vars(kind)
    ]
    assert len({kind.label for kind in kinds}) == len(kinds) > 6
