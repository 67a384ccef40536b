"""The judge service: HTTP in front, a queue in the middle, a language model behind."""
