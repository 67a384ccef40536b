"""What the programs of client, service and trainer share: how they start, end and log, and how they write files."""
