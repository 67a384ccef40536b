"""Settings to a running engine: finds the model, then loads it. The door is `engines.find_model` and `load_engine`."""
