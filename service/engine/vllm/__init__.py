"""The engine for GPUs: vLLM in processes of its own. The door is `engine.VllmEngine`."""
