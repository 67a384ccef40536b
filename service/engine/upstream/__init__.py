"""The engine that asks another server with OpenAI's API. The door is `engine.UpstreamEngine`."""
