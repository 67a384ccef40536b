"""Judging: prompt specs become prompts and jobs, and answers become judgements. The door is `pipeline.Pipeline`."""
