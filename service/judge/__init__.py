"""Judging: requests become prompts, prompts become jobs, answers become scores. The door is `pipeline.Judging`."""
