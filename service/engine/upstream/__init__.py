"""The engine that asks another server."""
