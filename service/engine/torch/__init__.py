"""The engine that runs transformers' models with torch in this process. The door is `engine.TorchEngine`."""
