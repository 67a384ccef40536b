"""What a process reports about itself: `logs`, `metrics` for Prometheus, `tracing` for OpenTelemetry."""
