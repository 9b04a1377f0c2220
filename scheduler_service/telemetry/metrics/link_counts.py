"""What the link to one executor counts."""

from scheduler_service.link.session_end import SessionEnd
from scheduler_service.telemetry.metrics import buckets
from scheduler_service.telemetry.metrics.distribution import Distribution


class LinkCounts:
    """Written by the event loop, read by the thread of the metrics server."""

    def __init__(self) -> None:
        self.num_plans = 0
        self.sessions_ended = dict.fromkeys(SessionEnd, 0)
        #: Seconds.
        self.round_trip = Distribution()
        self.round_trip.refine(buckets.LATENCY_S)
