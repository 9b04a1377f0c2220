"""What can go wrong with a request, and how a client gets to know it.

One exception per thing a caller can do about it; `to_status` is the only place that knows codes.
"""

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status


class RequestError(Exception):
    """Base of everything that ends one request and nothing else."""

    code = code_pb2.INTERNAL
    # Value of the reason label in metrics.
    label = "internal"

    def details(self) -> list[any_pb2.Any]:
        """Machine-readable details, as google.rpc messages."""
        return []


class InvalidFieldError(RequestError):
    """A field of the request is wrong."""

    code = code_pb2.INVALID_ARGUMENT
    label = "invalid_field"

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description

    def details(self) -> list[any_pb2.Any]:
        """Names the field."""
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=self.field, description=self.description
        )
        return [_pack(error_details_pb2.BadRequest(field_violations=[violation]))]


class DuplicateRequestError(RequestError):
    """The request id belongs to a live request."""

    code = code_pb2.ALREADY_EXISTS
    label = "duplicate_request"


class RetryableError(RequestError):
    """The same request may succeed later."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def details(self) -> list[any_pb2.Any]:
        """Says when to come back."""
        delay = duration_pb2.Duration()
        delay.FromMicroseconds(int(self.retry_after_s * 1e6))
        return [_pack(error_details_pb2.RetryInfo(retry_delay=delay))]


class QueueFullError(RetryableError):
    """Too many requests wait."""

    code = code_pb2.RESOURCE_EXHAUSTED
    label = "queue_full"


class QueueTokensError(RetryableError):
    """The sequences that wait are too large together."""

    code = code_pb2.RESOURCE_EXHAUSTED
    label = "queue_tokens"


class QueueWaitError(RetryableError):
    """The queue is so long that the request would wait for too long."""

    code = code_pb2.RESOURCE_EXHAUSTED
    label = "queue_wait"


class ClientLimitError(RetryableError):
    """One client has too many requests under way."""

    code = code_pb2.RESOURCE_EXHAUSTED
    label = "client_limit"


class ResponseMemoryError(RetryableError):
    """Answers that nobody may read could take up too much memory."""

    code = code_pb2.RESOURCE_EXHAUSTED
    label = "response_memory"


class TokenizerBusyError(RetryableError):
    """Too much text waits to be tokenized."""

    code = code_pb2.RESOURCE_EXHAUSTED
    label = "tokenizer_busy"


class DrainingError(RetryableError):
    """An administrator has asked the server to take no new requests."""

    code = code_pb2.UNAVAILABLE
    label = "draining"


class ShuttingDownError(RetryableError):
    """The server ends; another one, or its successor, takes the request."""

    code = code_pb2.UNAVAILABLE
    label = "shutting_down"


class CallTooOldError(RetryableError):
    """The call that many requests share takes no more of them; a new one does."""

    code = code_pb2.UNAVAILABLE
    label = "call_too_old"


class SupersededError(RequestError):
    """Another call resumed the request."""

    code = code_pb2.ABORTED
    label = "superseded"


class SlowReaderError(RequestError):
    """The client does not read its answer."""

    code = code_pb2.ABORTED
    label = "slow_reader"


class NeverFitsError(RequestError):
    """The KV cache is too small for the request, however long it waits."""

    code = code_pb2.RESOURCE_EXHAUSTED
    label = "never_fits"


class DeadlineError(RequestError):
    """The caller's deadline passed."""

    code = code_pb2.DEADLINE_EXCEEDED
    label = "deadline"


class NoExecutorError(RetryableError):
    """No executor was there for too long."""

    code = code_pb2.UNAVAILABLE
    label = "no_executor"


class ExecutorFailedError(RequestError):
    """The executor was lost again and again while it worked on this request."""

    code = code_pb2.INTERNAL
    label = "executor_failed"


def to_status(error: RequestError) -> grpc.Status:
    """The gRPC status of an error, with its details in the standard trailer."""
    return rpc_status.to_status(
        status_pb2.Status(code=error.code, message=str(error), details=error.details())
    )


def _pack(
    message: error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
