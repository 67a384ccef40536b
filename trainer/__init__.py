"""Self-improvement of a language model with preference labels from the judge service (not yet built)."""
