"""Prometheus metrics of the scheduler."""

from scheduler_service.telemetry.metrics.scheduler_metrics import SchedulerMetrics

__all__ = ["SchedulerMetrics"]
