"""What operators see: metrics, log lines of requests, traces."""
