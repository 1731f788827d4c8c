"""Client and command against the real app on a real port, over a real store and a real S3 server."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import uvicorn
from pydantic import SecretStr

from serve_app.app import build_app
from serve_app.auth import mint_token
from serve_app.cli.failures import EXIT_CODES
from serve_app.client import ApiError, AsyncClient, Client, DownloadError
from serve_app.embedded.s3 import BUCKET
from serve_app.lifecycle import Status
from serve_app.planner import plan_job
from serve_app.routes import journal
from serve_app.secrets import SecretVault
from serve_app.settings import Settings
from serve_app.store.jobs import JobStore
from serve_app.store.journal import Notes
from tests.conftest import DOCUMENTED, ORG, TINY, Idle, rows, with_fields
from tests.serve_app.test_client_and_cli import tuneyard

ROOT = Path(__file__).parents[2]


class Here:
    """A running service, and a client of it."""

    def __init__(self, url: str, settings: Settings, store: JobStore, s3: Any) -> None:
        self.url, self.settings, self.store, self.s3 = url, settings, store, s3
        self.token = mint_token(settings, ORG, "tester", 600)
        self.client = Client(url, self.token)
        keys = {"access_key_id": s3.access_key_id, "secret_access_key": s3.secret_access_key, "endpoint_url": s3.endpoint_url}
        self.secret_id = self.client.create_secret(ORG, "keys", "s3", keys)["secret_id"]

    def job(self, name: str = "e", **changes: Any) -> dict[str, Any]:
        fields = {
            "experiment_name": name,
            "model_details.base_model": TINY,
            "dataset_details.secret_id": self.secret_id,
            "dataset_details.dataset_path": f"s3://{BUCKET}/rows.jsonl",
        }
        return with_fields(DOCUMENTED, fields | changes)

    def submitted(self, name: str = "e") -> str:
        return str(self.client.submit(self.job(name))["request_id"])

    def play(self, request_id: str, status: Status = Status.COMPLETED, lines: int = 3) -> None:
        """A job actor's part: an attempt that tells something and ends."""
        self.store.start_attempt(request_id, 0, 1)
        self.store.report(request_id, 1, Notes(points=[{"step": s, "loss": 1 / s} for s in (1, 2)]))
        for i in range(lines):
            self.store.report(request_id, 1, Notes(lines=[(i % 2, float(i), f"line {i}\u2028end")]))
        self.store.finish(request_id, 1, status, message="over")

    def put(self, request_id: str, files: dict[str, bytes], sha256: dict[str, str] | None = None) -> None:
        """A finished run's folder."""
        listed = [
            {"name": name.removeprefix("adapter/"), "sha256": (sha256 or {}).get(name, hashlib.sha256(data).hexdigest())}
            for name, data in files.items()
        ]
        manifest = json.dumps({"adapter_files": listed}).encode()
        for name, data in {**files, "manifest.json": manifest}.items():
            self.s3.client().put_object(Bucket=BUCKET, Key=f"runs/{ORG}/{request_id}/{name}", Body=data)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        options = ["--url", self.url, "--token", self.token, "--org", ORG]
        # The proxy must not matter on the way to this machine, neither to the service nor to its storage.
        return tuneyard(self.settings.home / "user", *arguments, *options, HTTP_PROXY="http://127.0.0.1:9")


@pytest.fixture
def here(settings: Settings, store: JobStore, s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    monkeypatch.setattr(journal, "FOLLOW_POLL_S", 0.05)
    storage = {
        "storage_uri": f"s3://{BUCKET}/runs",
        "storage_endpoint_url": s3.endpoint_url,
        "storage_access_key_id": s3.access_key_id,
        "storage_secret_access_key": SecretStr(s3.secret_access_key),
    }
    settings = settings.model_copy(update=storage)

    class Planning(Idle):
        def plan(self, spec: Any, deadline: float) -> dict[str, Any]:
            return plan_job(spec, settings, SecretVault.from_settings(store, settings))

    app = build_app(settings, store, Planning())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    running = Here(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", settings, store, s3)
    yield running
    running.client.close()
    server.should_exit = server.force_exit = True
    thread.join(10)


def test_every_job_is_found_page_by_page(here: Here) -> None:
    made = [here.submitted(f"e{i}") for i in range(5)]

    async def found() -> list[str]:
        async with AsyncClient(here.url, here.token) as client:
            return [job["request_id"] async for job in client.iter_jobs(ORG, page_size=2)]

    assert [job["request_id"] for job in here.client.iter_jobs(ORG, page_size=2)] == made[::-1]
    assert asyncio.run(found()) == made[::-1]
    assert [job["experiment_name"] for job in here.client.iter_jobs(ORG, experiment_name="e3")] == ["e3"]


def test_logs_are_followed_while_they_are_written(here: Here) -> None:
    request_id = here.submitted()
    threading.Timer(0.2, here.play, (request_id,)).start()
    lines = [entry["line"] for entry in here.client.follow_logs(request_id, ORG)]
    assert lines == [f"line {i}\u2028end" for i in range(3)]
    assert [e["rank"] for e in here.client.follow_logs(request_id, ORG, rank=1)] == [1]
    assert [e["line"] for e in here.client.follow_logs(request_id, ORG, tail=1)] == lines[-1:]
    every = here.client.logs(request_id, ORG)["logs"]
    assert here.client.logs(request_id, ORG, after=every[0]["id"])["logs"] == every[1:]


def test_both_clients_follow_the_same_events(here: Here) -> None:
    request_id = here.submitted()
    here.play(request_id)

    async def followed() -> list[dict[str, Any]]:
        async with AsyncClient(here.url, here.token) as client:
            return [entry async for entry in client.follow_events(request_id, ORG)]

    events = list(here.client.follow_events(request_id, ORG))
    assert [e["kind"] for e in events] == ["queued", "started", "completed"]
    assert events == asyncio.run(followed()) == here.client.events(request_id, ORG)["events"]
    assert list(here.client.follow_events(request_id, ORG, after=events[0]["id"])) == events[1:]


def test_files_are_downloaded_whole_by_both_clients_and_the_command(here: Here, tmp_path: Path) -> None:
    request_id = here.submitted()
    files = {"adapter/weights.bin": bytes(range(256)) * 9000, "adapter/deep/config.json": b"{}"}
    here.put(request_id, files)

    async def download() -> list[Path]:
        async with AsyncClient(here.url, here.token) as client:
            return await client.download(request_id, ORG, tmp_path / "b")

    saved = [here.client.download(request_id, ORG, tmp_path / "a"), asyncio.run(download())]
    saved.append([Path(p) for p in json.loads(here.run("download", request_id, str(tmp_path / "c"), "--json").stdout)["files"]])
    for folder, paths in zip([tmp_path / "a", tmp_path / "b", tmp_path / "c"], saved, strict=True):
        found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        assert set(found) == {*files, "manifest.json"} == {str(p.relative_to(folder)) for p in paths}
        assert {name: found[name] for name in files} == files


def test_links_work_for_a_quarter_of_an_hour(here: Here) -> None:
    request_id = here.submitted()
    here.put(request_id, {"adapter/weights.bin": b"data"})
    links = [file["url"] for file in here.client.artifacts(request_id, ORG)["files"]]
    assert {parse_qs(urlsplit(link).query)["X-Amz-Expires"][0] for link in links} == {"900"}


def test_a_damaged_file_is_refused_and_leaves_nothing(here: Here, tmp_path: Path) -> None:
    request_id = here.submitted()
    here.put(request_id, {"adapter/weights.bin": b"data"}, sha256={"adapter/weights.bin": "0" * 64})
    with pytest.raises(DownloadError, match="damaged"):
        here.client.download(request_id, ORG, tmp_path / "to")
    assert [p for p in (tmp_path / "to").rglob("*") if p.is_file()] == []
    done = here.run("download", request_id, str(tmp_path / "again"))
    assert (done.returncode, "damaged" in done.stderr, "Traceback" in done.stderr) == (1, True, False)


def test_an_expired_link_is_asked_for_again_and_no_error_shows_one(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_id = here.submitted()
    here.put(request_id, {"adapter/weights.bin": b"data"})
    fresh = here.client.artifacts(request_id, ORG)

    def spoiled(listing: dict[str, Any]) -> dict[str, Any]:
        files = [f | {"url": f["url"].replace("X-Amz-Signature=", "X-Amz-Signature=0")} for f in listing["files"]]
        return {"files": files}

    listings = [spoiled(fresh), fresh]
    monkeypatch.setattr(here.client, "artifacts", lambda *_: listings.pop(0) if len(listings) > 1 else listings[0])
    assert sorted(p.name for p in here.client.download(request_id, ORG, tmp_path / "a")) == ["manifest.json", "weights.bin"]
    listings[:] = [spoiled(fresh)]
    with pytest.raises(DownloadError, match="403") as caught:
        here.client.download(request_id, ORG, tmp_path / "b")
    assert "Amz" not in str(caught.value)


def test_a_plan_is_made_and_shown(here: Here, tmp_path: Path) -> None:
    body = "".join(json.dumps(row) + "\n" for row in rows(30)).encode()
    here.s3.client().put_object(Bucket=BUCKET, Key="rows.jsonl", Body=body)
    path = tmp_path / "job.json"
    path.write_text(json.dumps(here.job("planned")))
    made = json.loads(here.run("plan", str(path), "--json").stdout)
    assert made == here.client.plan(here.job("planned"))
    shown = here.run("plan", str(path)).stdout
    assert f"{made['tokens']['trained_on']:,}" in shown
    assert all(sample["segments"][-1]["text"].split("\n")[0].strip() in shown for sample in made["samples"])
    assert "[[" in shown
    assert list(here.client.iter_jobs(ORG)) == []


def test_cancel_says_what_becomes_of_the_job(here: Here) -> None:
    waiting, running = here.submitted("waiting"), here.submitted("running")
    here.store.start_attempt(running, 0, 1)
    assert here.run("cancel", waiting).stdout == "CANCELED: Canceled before it started.\n"
    assert here.run("cancel", running).stdout == "RUNNING: it stops at its next step\n"


def test_commands_read_resume_and_remove(here: Here) -> None:
    request_id = here.submitted()
    here.play(request_id, Status.FAILED)
    here.put(request_id, {"adapter/weights.bin": b"data"})
    assert [json.loads(line)["line"] for line in here.run("logs", request_id, "-f", "--json").stdout.splitlines()] == [
        f"line {i}\u2028end" for i in range(3)
    ]
    assert here.run("logs", request_id, "--rank", "1").stdout.count("line ") == 1
    assert "started" in here.run("events", request_id).stdout
    points = json.loads(here.run("metrics", request_id, "--json", "--after-step", "1").stdout)
    assert [p["step"] for p in points["points"]] == [2]
    assert "adapter/weights.bin" in here.run("artifacts", request_id).stdout
    states = here.run("watch", request_id, "--json")
    assert (states.returncode, [json.loads(line)["status"] for line in states.stdout.splitlines()]) == (1, ["FAILED"])
    assert json.loads(here.run("resume", request_id, "--json").stdout)["status"] == "QUEUED"
    again = here.run("resume", request_id)
    assert (again.returncode, "only a FAILED or CANCELED one" in again.stderr) == (1, True)
    assert json.loads(here.run("secret", "remove", here.secret_id, "--json").stdout)["deleted"] is True
    assert here.client.list_secrets(ORG) == {"secrets": []}
    with pytest.raises(ApiError):
        here.client.delete_secret(here.secret_id, ORG)


@pytest.mark.parametrize("arguments", [("watch",), ("logs", "-f"), ("events", "-f")])
def test_ctrl_c_ends_the_looking_and_not_the_job(here: Here, arguments: tuple[str, ...]) -> None:
    request_id = here.submitted()
    here.store.start_attempt(request_id, 0, 1)
    here.store.report(request_id, 1, Notes(lines=[(0, 0.0, "a line")]))
    options = ["--url", here.url, "--token", here.token, "--org", ORG]
    with subprocess.Popen(
        [sys.executable, "-m", "serve_app.cli", arguments[0], request_id, *arguments[1:], *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job, such as these tests may be, ignores the signal, and its children with it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the job goes on" in said
    assert "Traceback" not in said
    assert here.client.get(request_id, ORG)["status"] == "RUNNING"


def test_the_guide_and_the_help_name_every_command_and_exit_code(tmp_path: Path) -> None:
    from serve_app.cli import app

    guide = " ".join((ROOT / "docs" / "guide.md").read_text().partition("## Commands")[2].partition("\n## ")[0].split())
    for command in app.registered_commands:
        name = command.name or str(command.callback and command.callback.__name__)
        assert re.search(rf"`{name}[` ]", guide), name
    for group in app.registered_groups:
        # The operator's have a page of their own.
        page = (ROOT / "docs" / "admin.md").read_text() if group.name == "admin" else guide
        for command in group.typer_instance.registered_commands if group.typer_instance else []:
            name = command.name or str(command.callback and command.callback.__name__)
            assert re.search(rf"`(tuneyard )?{group.name} [^`]*{name}", page), name
    shown = " ".join(tuneyard(tmp_path, "--help").stdout.split())
    for code, meaning in EXIT_CODES.items():
        assert f"{code} {meaning}" in guide
        assert f"{code} {meaning}" in shown
    assert "--install-completion" in guide


def test_help_imports_nothing_that_only_a_command_needs() -> None:
    heavy = ("torch", "ray", "httpx", "pydantic", "fastapi", "sqlalchemy", "plotext", "jwt", "serve_app.client")
    code = f"import sys, serve_app.cli; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_bug_is_one_line_without_what_it_was_about(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import serve_app.cli as cli

    def broken() -> None:
        raise KeyError("a secret")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    said = capsys.readouterr().err
    assert caught.value.code == 1
    assert said.startswith("a bug in Tuneyard, KeyError at ")
    assert "a secret" not in said
    assert said.count("\n") == 1


def test_whoami_takes_whatever_claims_there_are(tmp_path: Path) -> None:
    import jwt

    for claims in ({}, {"exp": 1e30, "orgs": "x"}, {"sub": "\x1b[2J", "scope": ["jobs:read"], "exp": 1}):
        token = (
            jwt.encode(claims, "k" * 32, "HS256")
            if "exp" not in claims
            else jwt.api_jws.encode(json.dumps(claims).encode(), "k" * 32)
        )
        done = tuneyard(tmp_path, "whoami", "--token", token)
        assert (done.returncode, done.stderr) == (0, "")
        assert "\x1b" not in done.stdout
        assert token not in done.stdout
        assert re.search(r"expired +True", done.stdout)
