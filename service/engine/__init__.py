"""Engines turn token ids into label log-probabilities, rewards or texts. `contract` is the door: what each must do."""
