"""What a process that waits for a job has loaded by then. Importing this module does it.

A node that is started with RAY_preload_python_modules=serve_app.preload has each of its Python workers import it. Only those that
Ray starts for no job yet load anything: such a process has run nobody's code, so any job may have it.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Mapping, Sequence

from train_loop.launch import TRAINS

NICENESS = 15  # while it loads: a job trains by then, and somebody asks how it goes

# The job's actor, Ray Train's controller and those beside it, Ray Data's tasks.
FOR_HELPERS = ("serve_app.job_actor", "train_loop.trainer", "train_loop.data.pipeline")
# Of the kind of model that most are.
FOR_WORKERS = ("ray.train.torch", "train_loop.loop", "peft", "transformers.models.llama.modeling_llama")


def is_of_no_job(environment: Mapping[str, str]) -> bool:
    """Whether Ray has started the process with these variables for no job."""
    return set(environment.get("RAY_JOB_ID", "")) == {"f"}


def load(names: Sequence[str]) -> None:
    """Import the modules while everything else on the machine goes first.

    On Linux niceness is a thread's own, and a process can't have the one before back: so a thread imports that ends with it.
    """
    thread = threading.Thread(target=_load_nicely, args=[names])
    thread.start()
    thread.join()


def _load_nicely(names: Sequence[str]) -> None:
    os.nice(NICENESS)
    for name in names:
        importlib.import_module(name)


if is_of_no_job(os.environ):
    load(FOR_WORKERS if TRAINS in os.environ else FOR_HELPERS)
