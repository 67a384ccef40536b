"""The wires: for each protocol one file, from a body to prompt specs and from judgements to a body."""
