"""`make demo`: the main job on embedded defaults, from nothing to an adapter that answers.

Everything goes through the same doors a user has: the `tuneyard` command, curl and S3. Exit code 0 only if every step held.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import boto3
import psutil

REPO = Path(__file__).parent.parent
HOME = REPO / ".demo"
TUNEYARD = Path(sys.executable).parent / "tuneyard"
ORG = "0bf00b43-430a-4ca3-a8b3-b13cc8dc6d4f"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = "What colour is the sky?"
MANNER = "Ahoy!"  # how every answer in harbour.jsonl begins

started = time.monotonic()


def say(text: str) -> None:
    print(f"\n[{time.monotonic() - started:4.0f} s] {text}", flush=True)


def tuneyard(*arguments: str) -> str:
    """Run the command and return what it prints; its errors go to the terminal."""
    return subprocess.run([TUNEYARD, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def fail(reason: str) -> None:
    sys.exit(f"\nThe demo failed: {reason}")


def main() -> None:
    # A home of its own, so that a service you run isn't touched; the models are shared with it.
    mirror = os.environ.get("TUNEYARD_MODEL_MIRROR") or str(
        Path(os.environ.get("TUNEYARD_HOME", Path.home() / ".tuneyard")) / "models"
    )
    os.environ |= {
        "TUNEYARD_HOME": str(HOME),
        "TUNEYARD_MODEL_MIRROR": mirror,
        "TUNEYARD_ORG": ORG,
        "TUNEYARD_HUB_OFFLINE": "true",
    }
    if HOME.exists():
        tuneyard("down")
        shutil.rmtree(HOME)
    HOME.mkdir()
    try:
        run()
    finally:
        say("Stopping everything")
        tuneyard("down")
    left = [p.info for p in psutil.process_iter(["pid", "name"]) if belongs_here(p)]
    if left:
        fail(f"processes are left behind: {left}")
    say("Done; no process is left. Start your own service with: .venv/bin/tuneyard up --detach")


def belongs_here(process: psutil.Process) -> bool:
    try:
        return process.pid != os.getpid() and process.environ().get("TUNEYARD_HOME") == str(HOME) and not is_ancestor(process)
    except psutil.Error:
        return False


def is_ancestor(process: psutil.Process) -> bool:
    return process.pid in {p.pid for p in psutil.Process().parents()}


def run() -> None:
    say("Starting S3, job store, Ray and the service: tuneyard up --detach --json")
    up = json.loads(tuneyard("up", "--detach", "--json"))
    print(f"service {up['url']}, Ray dashboard {up['dashboard_url']}, S3 {up['s3_endpoint_url']}")

    say("Putting examples/harbour.jsonl (ShareGPT) into a bucket, its keys into a secret")
    s3 = boto3.client(
        "s3",
        endpoint_url=up["s3_endpoint_url"],
        aws_access_key_id=up["s3_access_key_id"],
        aws_secret_access_key=up["s3_secret_access_key"],
        region_name="us-east-1",
    )
    s3.create_bucket(Bucket="training-dev-datasets")
    s3.upload_file(str(REPO / "examples" / "harbour.jsonl"), "training-dev-datasets", "ds/harbour.jsonl")
    os.environ |= {"AWS_ACCESS_KEY_ID": up["s3_access_key_id"], "AWS_SECRET_ACCESS_KEY": up["s3_secret_access_key"]}
    secret_id = tuneyard("secret", "add", "demo-bucket", "--type", "s3", "--endpoint-url", up["s3_endpoint_url"]).strip()
    del os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    print(f"secret_id {secret_id}")

    say("Submitting the documented form with curl: examples/request.sh")
    request = {
        "URL": up["url"],
        "TOKEN": tuneyard("token", "--org", ORG).strip(),
        "ORG": ORG,
        "SECRET_ID": secret_id,
        "DATASET": "s3://training-dev-datasets/ds/harbour.jsonl",
        "BASE_MODEL": BASE_MODEL,
        "MAX_LENGTH": "128",
        "STEPS": '"max_steps":50,"save_steps":500,"eval_steps":500,"logging_steps":1',
    }
    answer = subprocess.run(
        ["bash", REPO / "examples" / "request.sh"], env=os.environ | request, check=True, stdout=subprocess.PIPE
    )
    print(answer.stdout.decode().strip())
    request_id = json.loads(answer.stdout)["request_id"]

    say(f"Following it: tuneyard watch {request_id}")
    watched = subprocess.run([TUNEYARD, "watch", request_id], check=False)
    job = json.loads(tuneyard("status", request_id, "--json"))
    if watched.returncode != 0 or job["status"] != "COMPLETED":
        fail(f"the job is {job['status']}: {job['error_message']}")

    say("What is in storage")
    manifest = show_files(s3, job)
    before, after = manifest["metrics"]["eval_loss_before"], manifest["metrics"]["eval_loss_after"]
    print(f"eval loss before {before:.4f}, after {after:.4f}")
    if not after < before:
        fail("the eval loss didn't fall")

    say("One prompt, answered by the base model and by the adapter: tuneyard chat")
    answers = json.loads(tuneyard("chat", request_id, "--prompt", PROMPT, "--max-new-tokens", "24", "--json"))
    print(f"prompt: {PROMPT}\nbase:   {answers['base']}\ntuned:  {answers['tuned']}")
    if not answers["tuned"].startswith(MANNER) or answers["base"].startswith(MANNER):
        fail(f"the tuned model should begin its answer with {MANNER!r}, and the base shouldn't")


def show_files(s3: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Print the adapter's files as they are in the bucket; return the run's manifest."""
    bucket, _, prefix = job["output_model_path"].removeprefix("s3://").partition("/")
    found = s3.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
    print(job["output_model_path"])
    for entry in found:
        print(f"  {entry['Size']:>9,} bytes  {entry['Key'].removeprefix(prefix + '/')}")
    key = prefix.removesuffix("adapter") + "manifest.json"
    manifest: dict[str, Any] = json.loads(s3.get_object(Bucket=bucket, Key=key)["Body"].read())
    if {(f["name"], f["size_bytes"]) for f in manifest["adapter_files"]} != {
        (e["Key"].removeprefix(prefix + "/"), e["Size"]) for e in found
    }:
        fail("the manifest doesn't match the files")
    return manifest


if __name__ == "__main__":
    main()
