"""Experiment trackers that a job's metrics are sent to, besides the run's folder: MLflow, Weights & Biases."""
