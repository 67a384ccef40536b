"""What the policy is asked: read, deduplicated, categorised, chosen. Door: `selection.prepare_instructions`."""
