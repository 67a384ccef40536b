"""The engine for GPUs."""
