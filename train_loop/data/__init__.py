"""From JSONL in object storage to micro-batches in a worker."""
