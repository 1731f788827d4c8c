"""What a process of the service has to load before it answers."""

import subprocess
import sys

NOT_TRAINING = ("serve_app.app", "serve_app.job_actor", "serve_app.dispatcher", "serve_app.cli")
HEAVY = ("torch", "transformers", "peft", "bitsandbytes")  # a second and a hundred MiB or two, in every job's actor


def test_processes_that_do_not_train_start_without_what_trains():
    code = f"import sys, {', '.join(NOT_TRAINING)}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
