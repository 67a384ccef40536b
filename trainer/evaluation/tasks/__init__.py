"""Tasks whose answers a program checks: IFEval, BIG-Bench Hard, GSM8K. Door: `run.run_tasks`."""
