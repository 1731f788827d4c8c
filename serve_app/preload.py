"""What a process that waits for a job has loaded by then. Importing this module does it.

A node that is started with RAY_preload_python_modules=serve_app.preload has each of its Python workers import it. Only those that
Ray starts for no job yet load anything: such a process has run nobody's code, so any job may have it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping

from train_loop.launch import TRAINS

# The job's actor, Ray Train's controller and those beside it, Ray Data's tasks.
FOR_HELPERS = ("serve_app.job_actor", "train_loop.trainer", "train_loop.data.pipeline")
# Of the kind of model that most are.
FOR_WORKERS = ("ray.train.torch", "train_loop.loop", "peft", "transformers.models.llama.modeling_llama")


def is_of_no_job(environment: Mapping[str, str]) -> bool:
    """Whether Ray has started the process with these variables for no job."""
    return set(environment.get("RAY_JOB_ID", "")) == {"f"}


if is_of_no_job(os.environ):
    for name in FOR_WORKERS if TRAINS in os.environ else FOR_HELPERS:
        importlib.import_module(name)
