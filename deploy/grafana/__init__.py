"""The Grafana dashboards as Python, their JSON, and what reads that JSON back."""
