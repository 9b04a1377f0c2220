"""Prometheus metrics of the scheduler."""

from scheduler_service.metrics.scheduler_metrics import SchedulerMetrics

__all__ = ["SchedulerMetrics"]
