"""The judge in the shape that other libraries ask for. Adapters do not import these libraries: their users have."""
