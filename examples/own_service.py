"""What the demos have in common: a service with a home of its own, which is used through the doors that a user has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import psutil

REPO = Path(__file__).parent.parent
HOME = REPO / ".demo"
TUNEYARD = Path(sys.executable).parent / "tuneyard"
ORG = "0bf00b43-430a-4ca3-a8b3-b13cc8dc6d4f"
BUCKET = "training-dev-datasets"

started = time.monotonic()


def say(text: str) -> None:
    print(f"\n[{time.monotonic() - started:4.0f} s] {text}", flush=True)


def tuneyard(*arguments: str) -> str:
    """Run the command and return what it prints; its errors go to the terminal."""
    return subprocess.run([TUNEYARD, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def fail(reason: str) -> None:
    sys.exit(f"\nThe demo failed: {reason}")


def in_a_home_of_its_own(run: Callable[[], None]) -> None:
    """Do the demo where no service of yours is touched; nothing of it may be left running."""
    # The models are shared with yours.
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


def start() -> tuple[dict[str, Any], Any]:
    """Start the service; return what `tuneyard up --json` says of it, and a client of its S3."""
    say("Starting S3, job store, Ray and the service: tuneyard up --detach --json")
    up = json.loads(tuneyard("up", "--detach", "--json"))
    print(f"service {up['url']}, Ray dashboard {up['dashboard_url']}, S3 {up['s3_endpoint_url']}")
    s3 = boto3.client(
        "s3",
        endpoint_url=up["s3_endpoint_url"],
        aws_access_key_id=up["s3_access_key_id"],
        aws_secret_access_key=up["s3_secret_access_key"],
        region_name="us-east-1",
    )
    return up, s3


def put_into_bucket(files: list[Path], up: dict[str, Any], s3: Any) -> str:
    """Put the files below ds/ of a new BUCKET; return the id of a secret that holds its keys."""
    s3.create_bucket(Bucket=BUCKET)
    for file in files:
        s3.upload_file(str(file), BUCKET, f"ds/{file.name}")
    os.environ |= {"AWS_ACCESS_KEY_ID": up["s3_access_key_id"], "AWS_SECRET_ACCESS_KEY": up["s3_secret_access_key"]}
    secret_id = tuneyard("secret", "add", "demo-bucket", "--type", "s3", "--endpoint-url", up["s3_endpoint_url"]).strip()
    del os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    print(f"secret_id {secret_id}")
    return secret_id


def follow(request_id: str) -> dict[str, Any]:
    """Watch the job until its end; return it, if it is COMPLETED."""
    say(f"Following it: tuneyard watch {request_id}")
    watched = subprocess.run([TUNEYARD, "watch", request_id], check=False)
    job: dict[str, Any] = json.loads(tuneyard("status", request_id, "--json"))
    if watched.returncode != 0 or job["status"] != "COMPLETED":
        fail(f"the job is {job['status']}: {job['error_message']}")
    return job


def show_files(s3: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Print what was trained as it is in the bucket; return the run's manifest."""
    say("What is in storage")
    bucket, _, prefix = job["output_model_path"].removeprefix("s3://").partition("/")
    run, _, folder = prefix.rpartition("/")
    found = s3.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
    print(job["output_model_path"])
    for entry in found:
        print(f"  {entry['Size']:>9,} bytes  {entry['Key'].removeprefix(prefix + '/')}")
    manifest: dict[str, Any] = json.loads(s3.get_object(Bucket=bucket, Key=f"{run}/manifest.json")["Body"].read())
    if {(f["name"], f["size_bytes"]) for f in manifest[f"{folder}_files"]} != {
        (e["Key"].removeprefix(prefix + "/"), e["Size"]) for e in found
    }:
        fail("the manifest doesn't match the files")
    return manifest


def check_eval_loss(manifest: dict[str, Any]) -> None:
    """It must have fallen."""
    before, after = manifest["metrics"]["eval_loss_before"], manifest["metrics"]["eval_loss_after"]
    print(f"eval loss before {before:.4f}, after {after:.4f}")
    if not after < before:
        fail("the eval loss didn't fall")
