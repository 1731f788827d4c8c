"""Submit examples/submit.yaml from Python and follow it: URL, TOKEN, SECRET_ID and DATASET come from the environment."""

import os
from pathlib import Path

import yaml

from serve_app.client import Client

spec = yaml.safe_load((Path(__file__).parent / "submit.yaml").read_text())
spec["dataset_details"] |= {"dataset_path": os.environ["DATASET"], "secret_id": os.environ["SECRET_ID"]}
client = Client(os.environ["URL"], os.environ["TOKEN"])
accepted = client.submit(spec)
print(accepted["message"])
for job in client.watch(accepted["request_id"], spec["org"]):
    print(job["status"], job["phase"], f"{job['step']}/{job['total_steps']}")
print(job["output_model_path"] or job["error_message"])
