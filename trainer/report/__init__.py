"""A run as an HTML page (`page.write_run_report`), and the cards of its models."""
