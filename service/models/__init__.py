"""Model files: resolves a name to a folder, downloading and converting it if needed. The door is `resolve.resolve`."""
