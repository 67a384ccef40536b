"""Programs to run by hand: the demonstration, and benchmarks whose figures go to docs/figures.md."""
