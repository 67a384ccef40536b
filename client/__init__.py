"""Client for the judge-as-api service: the wire contract, the errors, and a typed HTTP client."""
