"""A run's folder: its files, its stages, and how they resume. Door: `stages.open_run`."""
