"""Wires: one file per protocol, from a request body to prompt specs and from judgements to the answer's body."""
