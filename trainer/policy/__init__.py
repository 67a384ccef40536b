"""The model that is improved: loading it, its chat template, sampling from it. Door: `sampling.sample_responses`."""
