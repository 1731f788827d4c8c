"""One training run: JobSpec in, adapter out. Runs with Ray, or in one process without it."""
