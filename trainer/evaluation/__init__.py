"""Is the new model better than the base? Door: `comparison.Evaluation`."""
