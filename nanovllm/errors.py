"""What can go wrong with a request: one exception per thing that a caller can do about it.

This is the only place that reads gRPC status codes and `google.rpc` details.
"""

from dataclasses import dataclass

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of the request that the server refused."""

    #: Name of the field, for example "sampling_params.top_p".
    field: str
    #: What is wrong with it and what would be right.
    description: str


class NanovllmError(Exception):
    """Base of every error that a call raises."""

    def __init__(self, message: str, code: grpc.StatusCode = grpc.StatusCode.UNKNOWN) -> None:
        super().__init__(message)
        #: The gRPC status code behind it.
        self.code = code


class InvalidRequestError(NanovllmError, ValueError):
    """The request is wrong and stays wrong; change the fields in `violations`."""

    def __init__(
        self, message: str, code: grpc.StatusCode, violations: tuple[FieldViolation, ...] = ()
    ) -> None:
        super().__init__(message, code)
        self.violations = violations

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the refused fields."""
        return tuple(violation.field for violation in self.violations)


class DuplicateRequestError(NanovllmError):
    """A live request has the same `request_id`; choose another or leave it out."""


class OverloadedError(NanovllmError):
    """The server's queue is full; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, code: grpc.StatusCode, retry_after_s: float) -> None:
        super().__init__(message, code)
        self.retry_after_s = retry_after_s


class RequestTooLargeError(NanovllmError):
    """The request can never be served by this server; make it shorter."""


class DeadlineExceededError(NanovllmError, TimeoutError):
    """The request took longer than its `timeout_s`."""


class RequestCancelledError(NanovllmError):
    """The call was cancelled, by this client or on the way."""


class UnavailableError(NanovllmError):
    """No server answers at the address, or it has no executor; try again later."""


class AuthenticationError(NanovllmError):
    """The server does not know the caller: the token is missing or wrong."""


class ExecutorChangeError(NanovllmError):
    """The scheduler's executors cannot be changed as asked; the message says why."""


class ServerError(NanovllmError):
    """The server failed, or answered something that it should not."""


#: Codes that need nothing but the message.
_PLAIN_ERRORS: dict[grpc.StatusCode, type[NanovllmError]] = {
    grpc.StatusCode.ALREADY_EXISTS: DuplicateRequestError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: RequestCancelledError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
}


#: What an administrator's change of the executors is refused with.
_EXECUTOR_CHANGE_CODES = (
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
)


def executor_change_error(error: grpc.RpcError, address: str) -> NanovllmError:
    """As `client_error`, of a call that changes the scheduler's executors."""
    if isinstance(error, grpc.Call) and error.code() in _EXECUTOR_CHANGE_CODES:
        return ExecutorChangeError(error.details() or error.code().name, error.code())
    return client_error(error, address)


def client_error(error: grpc.RpcError, address: str) -> NanovllmError:
    """Translates an error of a call, synchronous or asyncio.

    Args:
        error: What the call raised.
        address: The server's address, for messages about the connection.
    """
    if not isinstance(error, (grpc.Call, grpc.aio.AioRpcError)):
        return ServerError(f"the call to {address} failed: {error}")
    code: grpc.StatusCode = error.code()
    message: str = error.details() or code.name
    details = _details(error)
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequestError(message, code, _violations(details))
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            retry_after_s = _retry_after_s(details)
            if retry_after_s is None:
                return RequestTooLargeError(message, code)
            return OverloadedError(message, code, retry_after_s)
        case grpc.StatusCode.UNAVAILABLE:
            # The transport's own messages do not always name the address.
            return UnavailableError(f"{address} is unavailable: {message}", code)
        case _ if code in _PLAIN_ERRORS:
            return _PLAIN_ERRORS[code](message, code)
        case _:
            return ServerError(f"{code.name}: {message}", code)


def _details(error: grpc.Call | grpc.aio.AioRpcError) -> list[object]:
    try:
        status: status_pb2.Status | None = rpc_status.from_call(error)
    except ValueError:  # a trailer that contradicts the status itself
        return []
    if status is None:
        return []
    known = (error_details_pb2.BadRequest, error_details_pb2.RetryInfo)
    unpacked: list[object] = []
    for packed in status.details:
        for kind in known:
            message = kind()
            if packed.Unpack(message):
                unpacked.append(message)
    return unpacked


def _violations(details: list[object]) -> tuple[FieldViolation, ...]:
    return tuple(
        FieldViolation(violation.field, violation.description)
        for detail in details
        if isinstance(detail, error_details_pb2.BadRequest)
        for violation in detail.field_violations
    )


def _retry_after_s(details: list[object]) -> float | None:
    for detail in details:
        if isinstance(detail, error_details_pb2.RetryInfo):
            return detail.retry_delay.seconds + detail.retry_delay.nanos * 1e-9
    return None
