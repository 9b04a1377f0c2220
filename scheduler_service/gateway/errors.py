"""Statuses as gateways understand them.

Gateways retry RESOURCE_EXHAUSTED, UNAVAILABLE and DEADLINE_EXCEEDED, here or at another server, as
long as no message was sent. Our errors fit that but for those below.
"""

from google.rpc import code_pb2

from scheduler_service.errors import InvalidFieldError, NeverFitsError, RequestError
from scheduler_service.gateway.translation import with_their_name


class UnservableError(RequestError):
    """No server like this one can ever serve the request; trying again would be in vain."""

    code = code_pb2.FAILED_PRECONDITION
    label = "never_fits"


def for_gateway(error: RequestError) -> RequestError:
    """The error that a gateway is told."""
    match error:
        case InvalidFieldError():
            return with_their_name(error)
        case NeverFitsError():
            return UnservableError(str(error))
        case _:
            return error
