"""Getting a model's files onto this machine: the manifest of known names, the hub, packages, and GGUF conversion."""
