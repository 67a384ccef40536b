"""The load generator, `python -m client.load`: a seeded load on a running service, and what became of every request."""
