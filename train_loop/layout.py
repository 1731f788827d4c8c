"""Names in a run's folder, for who writes what was trained, checks it, or reads it without loading a model."""

from __future__ import annotations

# Folders of what was trained, at most one of each: an adapter, whole weights.
ADAPTER_FOLDER, MERGED_FOLDER = "adapter", "merged"
# Files of an adapter, as PEFT names them.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
