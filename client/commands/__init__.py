"""The command `judge`: every program of the package under one name, and two that only it has, `score` and `compare`."""
