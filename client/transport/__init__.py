"""How the typed client reaches a service: calls, connections, proxies, retries and the pacing of bulk calls."""
