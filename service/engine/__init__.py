"""Engines: whatever turns token ids into the log-probabilities of the labels. `contract` says what one must do."""
