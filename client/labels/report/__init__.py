"""A labelling for people to read: an HTML page with figures. Needs the extra `benchmarks`."""
