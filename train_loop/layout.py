"""Names in a run's folder, for who writes what was trained, checks it, or reads it without loading a model."""

from __future__ import annotations

# Folders of what was trained, at most one of each: an adapter, whole weights.
ADAPTER_FOLDER, MERGED_FOLDER = "adapter", "merged"
CHECKPOINTS = "checkpoints"  # needed to go on; once all is trained, by nobody
# What a run writes down about itself for its owner; the manifest, which comes last, lists these.
METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard/events.out.tfevents.0000000000.tuneyard"
REJECTED, JOB = "rejected.jsonl", "job.json"
RECORDS = (METRICS, TENSORBOARD, REJECTED, JOB)
MANIFEST = "manifest.json"
# Files of an adapter, as PEFT names them.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
