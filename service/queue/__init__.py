"""The job queue between HTTP and workers, in memory or on Redis. `contract` is the door: what each must guarantee."""
