"""Samples to scores to pairs. Doors: `labeling.run_labelling`, `pairs.write_pairs`."""
