"""The worker: takes jobs, batches them and runs the engine. The door is `loop.Worker`; `scheduler` is the policy."""
