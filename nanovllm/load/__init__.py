"""Load on a server: workloads, arrivals, measuring and reports.

Nothing but `runner.py` and the targets does input or output over the network or reads a clock.
"""

from nanovllm.load.report import LoadReport
from nanovllm.load.requests import LoadRequest, Session
from nanovllm.load.runner import run_closed, run_load, run_open
from nanovllm.load.target import GrpcTarget
from nanovllm.load.timing import Percentiles, RequestFailure, RequestTiming

__all__ = [
    "GrpcTarget",
    "LoadReport",
    "LoadRequest",
    "Percentiles",
    "RequestFailure",
    "RequestTiming",
    "Session",
    "run_closed",
    "run_load",
    "run_open",
]
