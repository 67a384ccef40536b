"""A run for people to read: an HTML page with figures, and a table on the terminal. Needs the extra `benchmarks`."""
