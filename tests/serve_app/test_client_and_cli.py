"""The client and the command against a real HTTP server that keeps what it was sent."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import inspect
import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import httpx
import psutil
import pytest
import typer
from rich.console import Console

from serve_app import cli
from serve_app.cli import read_spec
from serve_app.client import ApiError, AsyncClient, Client
from serve_app.client.answers import MAX_TRIES, PATIENCE_S, gives_up
from serve_app.embedded.lifetime import _since_boot_s
from serve_app.progress import describe, follow, summary
from tests.conftest import DOCUMENTED, ORG

SECTIONS = ("dataset_config", "model_details", "train_config", "dataset_details", "infra_config")
JOB = "3f0c6b1e-0000-4000-8000-000000000001"
TOKEN = "header.payload.signature"


@dataclass
class Answer:
    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Server:
    """Gives its answers in order, the last one for ever."""

    url: str
    answers: list[Answer] = field(default_factory=list)
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            here.requests.append((f"{self.command} {self.path}", dict(self.headers.items()), body))
            given = here.answers.pop(0) if len(here.answers) > 1 else here.answers[0]
            text = given.body if isinstance(given.body, str) else json.dumps(given.body)
            self.send_response(given.status)
            for name, value in given.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def do_DELETE(self) -> None:
            self.answer()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here = Server(f"http://127.0.0.1:{httpd.server_port}")
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield here
    httpd.shutdown()
    httpd.server_close()


def job(status: str, phase: str, **more: Any) -> dict[str, Any]:
    return {"request_id": JOB, "experiment_name": "e", "status": status, "phase": phase, "message": "", **more}


def tuneyard(home: Path, *arguments: str, typed: str = "", timeout_s: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it, in a home of its own, without a terminal."""
    ours = ("TUNEYARD_", "AWS_", "HF_TOKEN", "GOOGLE_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return subprocess.run(
        [sys.executable, "-m", "serve_app.cli", *arguments],
        env=clean | {"TUNEYARD_HOME": str(home)} | env,
        input=typed,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def sent_job(headers: dict[str, str], body: bytes) -> dict[str, Any]:
    """The job in a form whose parts are no files."""
    head = f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode()
    parts = list(BytesParser(policy=HTTP).parsebytes(head + body).iter_parts())
    assert all(p.get_filename() is None for p in parts)
    sent = {str(p.get_param("name", header="Content-Disposition")): p.get_content() for p in parts}
    return {k: json.loads(v) if k in SECTIONS else v for k, v in sent.items()}


def test_submit_sends_the_documented_form(server: Server) -> None:
    server.answers = [Answer(200, {"request_id": JOB})]
    Client(server.url, TOKEN).submit(DOCUMENTED)
    (line, headers, body), *_ = server.requests
    assert line == "POST /job/"
    assert headers["Authorization"] == f"Bearer {TOKEN}"
    assert sent_job(headers, body) == DOCUMENTED


def test_a_retried_submission_carries_one_idempotency_key(server: Server) -> None:
    server.answers = [Answer(503, {"detail": "away"}, {"Retry-After": "0"}), Answer(200, {"request_id": JOB})]
    Client(server.url, TOKEN).submit(DOCUMENTED)
    assert len(server.requests) == 2
    assert len({headers["Idempotency-Key"] for _, headers, _ in server.requests}) == 1


def test_a_submission_may_bring_its_own_idempotency_key(server: Server) -> None:
    server.answers = [Answer(200, {"request_id": JOB})]
    Client(server.url, TOKEN).submit(DOCUMENTED, idempotency_key="nightly-7")
    assert server.requests[-1][1]["Idempotency-Key"] == "nightly-7"


def test_a_replica_that_died_over_a_request_is_asked_again_and_a_fault_of_the_service_is_not(server: Server) -> None:
    ok = Answer(200, {"request_id": JOB})
    server.answers = [Answer(500, "Internal Server Error"), ok]
    assert Client(server.url, TOKEN).submit({"org": ORG})["request_id"] == JOB
    server.answers = [Answer(500, {"detail": "an unexpected error"}), ok]
    with pytest.raises(ApiError) as caught:
        Client(server.url, TOKEN).submit({"org": ORG})
    assert caught.value.status == 500


def test_a_service_that_restarts_again_and_again_is_asked_longer_than_one_that_is_not_there(server: Server) -> None:
    server.answers = [
        *[Answer(500, "Internal Server Error", {"Retry-After": "0"})] * 3 * MAX_TRIES,
        Answer(200, {"request_id": JOB}),
    ]
    assert Client(server.url, TOKEN).submit({"org": ORG})["request_id"] == JOB
    busy, absent = ApiError(503, "away", []), httpx.ConnectError("refused")
    assert not gives_up(busy, MAX_TRIES, PATIENCE_S - 1)
    assert gives_up(busy, MAX_TRIES, PATIENCE_S)
    assert gives_up(absent, MAX_TRIES, 0)
    assert not any(gives_up(error, MAX_TRIES - 1, PATIENCE_S) for error in (busy, absent))


def test_the_client_waits_as_long_as_it_is_told(server: Server) -> None:
    server.answers = [Answer(429, {"detail": "slow down"}, {"Retry-After": "1"}), Answer(200, job("QUEUED", "queued"))]
    started = time.monotonic()
    Client(server.url, TOKEN).get(JOB, ORG)
    assert time.monotonic() - started >= 1.0


def test_a_secret_is_never_sent_twice(server: Server) -> None:
    server.answers = [Answer(503, {"detail": "away"}, {"Retry-After": "0"})]
    with pytest.raises(ApiError, match="away"):
        Client(server.url, TOKEN).create_secret(ORG, "n", "s3", {"access_key_id": "a", "secret_access_key": "b"})
    assert len(server.requests) == 1


def test_an_error_shows_its_detail_and_every_field() -> None:
    fields = [{"field": "org", "message": "must be a UUID"}, {"field": "infra_config", "message": "required"}]
    shown = str(ApiError(422, "two fields are wrong", fields))
    assert [line.strip() for line in shown.splitlines()] == [
        "422: two fields are wrong",
        "org: must be a UUID",
        "infra_config: required",
    ]
    assert str(ApiError(422, "org: must be a UUID (and 1 more)", fields)).splitlines() == [
        "422: org: must be a UUID (and 1 more)",
        "  infra_config: required",
    ]


@pytest.mark.parametrize("body", ["<html>Bad gateway</html>", ["a", "list"], {"detail": [{"msg": "x"}], "errors": "y"}])
def test_an_error_that_is_no_problem_document_is_still_an_api_error(server: Server, body: Any) -> None:
    server.answers = [Answer(404, body)]
    with pytest.raises(ApiError) as caught:
        Client(server.url, TOKEN).get(JOB, ORG)
    assert caught.value.status == 404


def test_a_page_instead_of_json_is_an_api_error(server: Server) -> None:
    server.answers = [Answer(200, "<html>a proxy's log-in page</html>")]
    with pytest.raises(ApiError, match="didn't answer in JSON"):
        Client(server.url, TOKEN).get(JOB, ORG)


def test_the_token_shows_in_no_repr_and_no_error() -> None:
    assert TOKEN not in repr(Client("http://127.0.0.1:1", TOKEN))
    with pytest.raises(ValueError, match="isn't a JWT") as caught:
        Client("http://127.0.0.1:1", f"{TOKEN}\nsecond-line")
    assert TOKEN not in str(caught.value)


def test_watch_ends_with_the_final_state(server: Server) -> None:
    server.answers = [Answer(200, job("RUNNING", "training")), Answer(200, job("COMPLETED", "done"))]
    assert [j["status"] for j in Client(server.url, TOKEN).watch(JOB, ORG, poll_s=0)] == ["RUNNING", "COMPLETED"]


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_yaml_and_json_hold_the_same_job(tmp_path: Path, suffix: str) -> None:
    import yaml

    path = tmp_path / f"job.{suffix}"
    path.write_text(json.dumps(DOCUMENTED) if suffix == "json" else yaml.safe_dump(DOCUMENTED))
    assert read_spec(path, {}, []) == DOCUMENTED


def test_yaml_scalars_are_those_of_json(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("a: 1e-4\nb: 2026-01-01\nc: on\nd: null\ne: 0.5\nf: -3\ng: true\nh: 1.0e3\ni: 010\n")
    spec = read_spec(path, {}, [])
    expected = {"a": 1e-4, "b": "2026-01-01", "c": "on", "d": None, "e": 0.5, "f": -3, "g": True, "h": 1e3, "i": "010"}
    assert spec == expected


def test_flags_and_assignments_reach_their_field_even_in_an_empty_section(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("train_config:\ninfra_config: {gpu_type: cpu}\n")
    flags = {"infra_config.gpu_type": "h100", "experiment_name": None}
    spec = read_spec(path, flags, ["train_config.hyperparameters.max_steps=3", "dataset_config.split.ratios=[0.8,0.2]"])
    assert spec == {
        "train_config": {"hyperparameters": {"max_steps": 3}},
        "infra_config": {"gpu_type": "h100"},
        "dataset_config": {"split": {"ratios": [0.8, 0.2]}},
    }


@pytest.mark.parametrize(
    ("content", "assignment", "says"),
    [
        (b"a: [", "x=1", "neither YAML nor JSON"),
        (b"org: a\norg: b\n", "x=1", "org is given twice"),
        (b"\xff\xfe\x00", "x=1", "isn't UTF-8"),
        (b"- a list\n", "x=1", "must hold an object"),
        (b"infra_config: {gpu_type: cpu}\n", "infra_config.gpu_type.x=1", "infra_config.gpu_type isn't an object"),
        (b"a: 1\n", "no-equals", "write it as name=value"),
        (b"? [a]\n: b\n", "x=1", "line 1: a name must be a text"),
        (b"a: &a {x: *a}\n", "x=1", "holds what JSON can't: Circular reference"),
        (b"a: !!timestamp 2026-01-01\n", "x=1", "holds what JSON can't: Object of type date"),
        (b"a: !!int x\n", "x=1", "holds what JSON can't: invalid literal"),
        (b"[" * 5000, "x=1", "holds what JSON can't: maximum recursion depth"),
    ],
)
def test_a_bad_file_or_assignment_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, assignment: str, says: str
) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(typer.Exit) as caught:
        read_spec(path, {}, [assignment])
    assert caught.value.exit_code == 2
    assert says in capsys.readouterr().err


def test_an_org_that_is_no_text_is_one_sentence(tmp_path: Path) -> None:
    for org in ("5", "[a]", "{a: 1}", "nonsense"):
        (tmp_path / "job.yaml").write_text(f"org: {org}\n")
        done = tuneyard(tmp_path, "submit", str(tmp_path / "job.yaml"), "--url", "http://127.0.0.1:9", "--token", TOKEN)
        assert done.returncode == 2
        assert done.stderr.endswith("isn't an organisation: it must be a UUID\n")


def test_a_token_that_is_none_or_would_have_expired_is_wrong_usage(tmp_path: Path) -> None:
    done = tuneyard(tmp_path, "status", JOB, "--org", ORG, "--url", "http://127.0.0.1:9", "--token", "")
    assert (done.returncode, done.stderr) == (2, "the token is empty\n")
    done = tuneyard(tmp_path, "token", "--org", ORG, "--ttl-s", "0")
    assert done.returncode == 2
    assert "--ttl-s" in done.stderr


@pytest.mark.parametrize(
    "metrics", [None, {}, {"last": None}, {"last": {"loss": 2.0}}, {"last": {"loss": None, "tokens_per_second": 7.0}}]
)
def test_progress_is_shown_whatever_metrics_are_missing(metrics: Any) -> None:
    shown = describe(job("RUNNING", "training", total_steps=9, step=None, eta_s=None, metrics=metrics))
    assert shown.startswith("RUNNING training  step 0/9")


def test_without_a_terminal_watch_prints_a_line_for_each_change() -> None:
    screen = io.StringIO()
    step = job("RUNNING", "training", progress=0.5, step=1, total_steps=2)
    failed = job("FAILED", "training", progress=None, error_message="the bucket is gone")
    last = follow(iter([step, step, failed]), Console(file=screen))
    lines = [line.strip() for line in screen.getvalue().splitlines() if line.strip()]
    assert lines == ["50%  RUNNING training  step 1/2", "0%  FAILED training", "the bucket is gone"]
    assert last is failed


@pytest.mark.parametrize("folder", ["adapter", "merged"])
def test_where_the_outcome_is_is_told_whichever_kind_it_is(folder: str) -> None:
    screen = io.StringIO()
    done = job("COMPLETED", "done", progress=1.0, output_model_path=f"s3://b/run/{folder}")
    follow(iter([done]), Console(file=screen))
    assert screen.getvalue().splitlines()[-1] == f"output: s3://b/run/{folder}"


def test_eval_loss_is_told_as_before_training_until_there_is_one_after() -> None:
    once = {"last": None, "best": None, "eval_loss_before": 2.0, "eval_loss_after": 2.0}
    again = once | {"best": {"step": 3, "eval_loss": 1.5}, "eval_loss_after": 1.5}
    said = [summary(job("CANCELED", "training", metrics=metrics)).splitlines()[-1] for metrics in (once, again)]
    assert said == ["eval loss 2.0000 before training", "eval loss 2.0000 -> 1.5000"]


def test_of_a_start_that_fails_only_its_own_lines_of_the_log_are_shown(tmp_path: Path) -> None:
    (tmp_path / "s3").write_text("no folder")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "up.log").write_text("Tuneyard is up: http://127.0.0.1:1\n")
    failed = tuneyard(tmp_path, "up", "--detach")
    assert failed.returncode == 1
    assert failed.stderr.splitlines() == [
        f"Tuneyard didn't start; the end of {tmp_path / 'logs' / 'up.log'}:",
        f"{tmp_path / 's3'}: File exists",
        "Tuneyard is down.",
    ]


def test_the_version_is_printed(tmp_path: Path) -> None:
    assert tuneyard(tmp_path, "--version").stdout == f"tuneyard {version('tuneyard')}\n"


def test_help_is_quick_and_names_every_command(tmp_path: Path) -> None:
    heavy = "import sys, serve_app.cli; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", heavy], check=False).returncode == 0
    shown = tuneyard(tmp_path, "--help").stdout
    for name in ["up", "down", "models", "token", "settings", "secret", "submit", "status", "list", "cancel", "watch", "chat"]:
        assert f" {name} " in shown


def test_settings_lists_them_without_values(tmp_path: Path) -> None:
    shown = tuneyard(tmp_path, "settings", TUNEYARD_JWT_SECRET="s" * 40, COLUMNS="200").stdout
    assert "TUNEYARD_MAX_RUNNING_JOBS" in shown
    assert "s" * 40 not in shown


@pytest.mark.parametrize(
    ("arguments", "env", "code", "says"),
    [
        (["list", "--org", ORG], {}, 1, "start it with: tuneyard up --detach"),
        (["list"], {}, 2, "which organisation?"),
        (["list", "--org", "nobody"], {}, 2, "must be a UUID"),
        (["list", "--org", ORG], {"TUNEYARD_MAX_RUNNING_JOBS": "many"}, 1, "TUNEYARD_MAX_RUNNING_JOBS: "),
        (["token", "--org", ORG], {}, 1, "tuneyard up hasn't made one here yet"),
        (["token", "--org", ORG], {"TUNEYARD_JWT_JWKS_URL": "https://issuer/keys"}, 1, "get a token from that issuer"),
        (["token", "--org", ORG], {"TUNEYARD_JWT_SECRET": "short"}, 1, "at least 32 bytes"),
    ],
)
def test_an_expected_failure_is_a_sentence_and_no_traceback(
    tmp_path: Path, arguments: list[str], env: dict[str, str], code: int, says: str
) -> None:
    done = tuneyard(tmp_path, *arguments, **env)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("model_type", "file", "code", "says"),
    [
        ("llm", "picture.png", 1, "sees no images"),
        ("vlm", "missing.png", 2, "missing.png can't be read: No such file"),
        ("vlm", "text.png", 2, "text.png is no JPEG, PNG, WebP, GIF, BMP or TIFF"),
    ],
)
def test_chat_says_what_is_wrong_with_a_picture_before_it_loads_a_model(
    tmp_path: Path, server: Server, model_type: str, file: str, code: int, says: str
) -> None:
    (tmp_path / "text.png").write_text("a cat")
    sections = {"model_details": {"model_type": model_type}, "dataset_config": {"preprocessing": {}}}
    server.answers = [Answer(200, job("COMPLETED", "done", output_model_path="s3://b/merged", **sections))]
    asked = ["chat", JOB, "--prompt", "What?", "--image", str(tmp_path / file), "--org", ORG]
    done = tuneyard(tmp_path, *asked, "--url", server.url, "--token", TOKEN)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_home_shows_its_token_to_its_own_service_only(tmp_path: Path, server: Server) -> None:
    server.answers = [Answer(200, {"jobs": [], "next_cursor": None})]
    (tmp_path / "jwt.key").write_text("k" * 48)
    refused = tuneyard(tmp_path, "list", "--org", ORG, "--url", server.url)
    assert refused.returncode == 1
    assert "give --token" in refused.stderr
    assert server.requests == []
    runs_here(tmp_path, server)
    allowed = tuneyard(tmp_path, "list", "--org", ORG, "--json")
    assert json.loads(allowed.stdout) == {"jobs": [], "next_cursor": None}
    assert server.requests[-1][1]["Authorization"].startswith("Bearer ey")


def runs_here(home: Path, server: Server, **more: str) -> None:
    """Have `server` be the service of this home."""
    me = {"pid": os.getpid(), "since_boot_s": _since_boot_s(psutil.Process())}
    (home / "up.json").write_text(json.dumps(me | {"ready": True, "url": server.url} | more))


def test_a_shell_takes_what_it_needs_of_the_service_here(tmp_path: Path, server: Server) -> None:
    (tmp_path / "jwt.key").write_text("k" * 48)
    away = tuneyard(tmp_path, "env", "--org", ORG)
    assert (away.returncode, away.stdout) == (1, "")
    assert "tuneyard up --detach" in away.stderr
    runs_here(tmp_path, server, s3_endpoint_url="http://127.0.0.1:9", s3_access_key_id="AK", s3_secret_access_key="a'b $HOME")
    printed = tuneyard(tmp_path, "env", "--org", ORG.upper())
    said = "$ORG $URL $AWS_ENDPOINT_URL $AWS_ACCESS_KEY_ID $AWS_SECRET_ACCESS_KEY"
    script = f'{printed.stdout}\nsh -c \'printf "%s\\n" "{said}" "$TOKEN"\''
    *shown, token = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert shown == [f"{ORG} {server.url} http://127.0.0.1:9 AK a'b $HOME"]
    whoami = json.loads(tuneyard(tmp_path, "whoami", "--token", token, "--json").stdout)
    assert (whoami["orgs"], whoami["expired"]) == ([ORG], False)
    assert json.loads(tuneyard(tmp_path, "env", "--json").stdout)["URL"] == server.url  # the org is remembered


@pytest.mark.parametrize(("status", "code"), [("COMPLETED", 0), ("FAILED", 1), ("CANCELED", 1)])
def test_watch_succeeds_only_when_the_job_did(tmp_path: Path, server: Server, status: str, code: int) -> None:
    server.answers = [Answer(200, job(status, "done", output_model_path="s3://b/run/adapter"))]
    done = tuneyard(tmp_path, "watch", JOB, "--org", ORG, "--url", server.url, "--token", TOKEN)
    assert done.returncode == code
    assert "s3://b/run/adapter" in done.stdout


def test_every_command_can_print_json() -> None:
    def of(group: typer.Typer, above: str = "") -> Iterator[tuple[str, Any]]:
        for command in group.registered_commands:
            assert command.callback is not None
            yield above + (command.name or command.callback.__name__), command.callback
        for inner in group.registered_groups:
            assert inner.typer_instance is not None
            yield from of(inner.typer_instance, f"{inner.name} ")

    commands = dict(of(cli.app))
    assert {"up", "down", "list", "secret add", "db upgrade"} <= commands.keys()
    assert [name for name, callback in commands.items() if "as_json" not in inspect.signature(callback).parameters] == []


def test_list_asks_for_a_page_by_name_and_cursor(tmp_path: Path, server: Server) -> None:
    usual = {"request_id": JOB, "created_at": "2026-01-01T00:00:00.000Z", "progress": 0.414, "error_code": "hang"}
    states = [("QUEUED", "queued"), ("QUEUED", "queued"), ("RUNNING", "training"), ("FAILED", "training"), ("CANCELED", "done")]
    jobs = [job(*state) | usual | {"queue_position": 3 if i == 0 else None} for i, state in enumerate(states)]
    server.answers = [Answer(200, {"jobs": jobs, "next_cursor": "Mw=="})]
    filters = ["--name", "e", "--cursor", "NQ==", "--status", "queued", "--limit", "1"]
    done = tuneyard(tmp_path, "list", *filters, "--org", ORG, "--url", server.url, "--token", TOKEN)
    asked = parse_qs(urlsplit(server.requests[-1][0].split()[-1]).query)
    assert asked == {"org_id": [ORG], "status": ["QUEUED"], "experiment_name": ["e"], "limit": ["1"], "cursor": ["NQ=="]}
    assert "--cursor Mw==" in done.stderr
    assert done.stdout.splitlines() == [
        f"{JOB}  QUEUED    2026-01-01T00:00:00  e  position 3",
        f"{JOB}  QUEUED    2026-01-01T00:00:00  e",
        f"{JOB}  RUNNING   2026-01-01T00:00:00  e  training 41%",
        f"{JOB}  FAILED    2026-01-01T00:00:00  e  hang",
        f"{JOB}  CANCELED  2026-01-01T00:00:00  e",
    ]


@pytest.mark.parametrize(
    ("arguments", "answer", "says"),
    [
        (["list"], {"jobs": [], "next_cursor": None}, "no jobs yet"),
        (["list", "--status", "failed"], {"jobs": [], "next_cursor": None}, "no such jobs"),
        (["artifacts", JOB], {"files": []}, "no files yet"),
        (["secret", "list"], {"secrets": []}, "no secrets"),
        (["webhook", "list"], {"webhooks": []}, "no webhooks"),
    ],
)
def test_a_list_of_nothing_says_so_beside_what_a_script_reads(
    tmp_path: Path, server: Server, arguments: list[str], answer: Any, says: str
) -> None:
    server.answers = [Answer(200, answer)]
    done = tuneyard(tmp_path, *arguments, "--org", ORG, "--url", server.url, "--token", TOKEN)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"{says}\n")


def test_secret_list_shows_what_may_be_told(tmp_path: Path, server: Server) -> None:
    secret = {"secret_id": JOB, "name": "my\x1bkeys", "type": "aws", "created_at": "2026-01-01T00:00:00.000Z"}
    where = ["--org", ORG, "--url", server.url, "--token", TOKEN]
    server.answers = [Answer(200, {"secrets": [secret]}), Answer(200, {"secrets": [secret]})]
    assert tuneyard(tmp_path, "secret", "list", *where).stdout.split() == [JOB, "aws", "my\N{REPLACEMENT CHARACTER}keys"]
    assert json.loads(tuneyard(tmp_path, "secret", "list", "--json", *where).stdout) == {"secrets": [secret]}


def test_what_belongs_to_a_home_is_told_as_json(tmp_path: Path) -> None:
    assert json.loads(tuneyard(tmp_path, "down", "--json").stdout) == {"was_running": False}
    assert json.loads(tuneyard(tmp_path, "db", "upgrade", "--json").stdout) == {"upgraded": True}


def test_the_shell_completes_commands(tmp_path: Path) -> None:
    asked = {"COMP_WORDS": "tuneyard secret re", "COMP_CWORD": "2", "_TUNEYARD_COMPLETE": "complete_bash"}
    code = "import sys; from serve_app.cli import main; sys.argv = ['tuneyard']; main()"
    env = os.environ | asked | {"TUNEYARD_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["remove"]


def test_submit_json_prints_the_answer_alone(tmp_path: Path, server: Server) -> None:
    answer = {"request_id": JOB, "status": "QUEUED", "message": "Queued.", "experiment_name": "e"}
    server.answers = [Answer(200, answer)]
    path = tmp_path / "job.json"
    path.write_text(json.dumps(DOCUMENTED))
    done = tuneyard(tmp_path, "submit", str(path), "--json", "--url", server.url, "--token", TOKEN)
    assert json.loads(done.stdout) == answer


@pytest.mark.parametrize("command", ["submit", "plan"])
def test_submit_and_plan_take_the_same_flags(tmp_path: Path, server: Server, command: str) -> None:
    server.answers = [Answer(200, {"request_id": JOB})]
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"org": ORG, "experiment_name": "e", "dataset_details": {"dataset_type": "jsonl"}}))
    flags = ["--name", "n", "--base-model", "m", "--dataset", "s3://b/k", "--secret-id", JOB, "--epochs", "0.5"]
    flags += ["--max-steps", "3", "--learning-rate", "2e-4", "--gpu-type", "cpu", "--gpu-count", "2", "--node-count", "4"]
    flags += ["--set", "dataset_config.split.type=none", "--json", "--url", server.url, "--token", TOKEN]
    done = tuneyard(tmp_path, command, str(path), *flags)
    assert json.loads(done.stdout) == {"request_id": JOB}
    (line, headers, body), *_ = server.requests
    assert line == {"submit": "POST /job/", "plan": "POST /job/plan/"}[command]
    assert sent_job(headers, body) == {
        "org": ORG,
        "experiment_name": "n",
        "model_details": {"base_model": "m"},
        "dataset_details": {"dataset_type": "jsonl", "dataset_path": "s3://b/k", "secret_id": JOB},
        "train_config": {"hyperparameters": {"num_epochs": 0.5, "max_steps": 3, "learning_rate": 2e-4}},
        "infra_config": {"gpu_type": "cpu", "gpu_count": 2, "node_count": 4},
        "dataset_config": {"split": {"type": "none"}},
    }


ROLE = "arn:aws:iam::123456789012:role/tuneyard"
KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key"}
STORED = {"access_key_id": "id", "secret_access_key": "key"}


@pytest.mark.parametrize(
    ("arguments", "env", "typed", "type_", "data"),
    [
        ([], KEYS | {"AWS_ENDPOINT_URL": "http://s3"}, "", "s3", STORED | {"endpoint_url": "http://s3"}),
        (["--endpoint-url", "http://a"], KEYS | {"AWS_ENDPOINT_URL": "b"}, "", "s3", STORED | {"endpoint_url": "http://a"}),
        ([], {}, "id\nkey\n", "s3", STORED),
        (["--type", "aws", "--region", "us-west-2"], KEYS, "", "aws", STORED | {"region": "us-west-2"}),
        (
            ["--type", "aws"],
            KEYS | {"AWS_SESSION_TOKEN": "t", "AWS_ENDPOINT_URL": "b"},
            "",
            "aws",
            STORED | {"session_token": "t"},
        ),
        # A token in the environment isn't one of keys that are typed in.
        (["--type", "aws"], {"AWS_SESSION_TOKEN": "t"}, "id\nkey\n", "aws", STORED),
        (["--type", "aws", "--role-arn", ROLE], {"AWS_EXTERNAL_ID": "ext"}, "", "aws", {"role_arn": ROLE, "external_id": "ext"}),
        (["--type", "aws", "--role-arn", ROLE], KEYS, "", "aws", {"role_arn": ROLE}),
        (["--role-arn", ROLE, "--endpoint-url", "https://e"], {}, "", "s3", {"role_arn": ROLE, "endpoint_url": "https://e"}),
        (["--type", "hf"], {"HF_TOKEN": "hf_x"}, "", "hf", {"token": "hf_x"}),
        (["--type", "hf"], {}, "hf_y\n", "hf", {"token": "hf_y"}),
        (
            ["--type", "mlflow"],
            {"MLFLOW_TRACKING_URI": "http://m", "MLFLOW_TRACKING_TOKEN": "t"},
            "",
            "mlflow",
            {"tracking_uri": "http://m", "token": "t"},
        ),
        (["--type", "wandb"], {"WANDB_PROJECT": "p"}, "key\n", "wandb", {"api_key": "key", "project": "p"}),
    ],
)
def test_secret_add_takes_values_from_the_environment_or_asks(
    tmp_path: Path, server: Server, arguments: list[str], env: dict[str, str], typed: str, type_: str, data: dict[str, str]
) -> None:
    server.answers = [Answer(200, {"secret_id": "made"})]
    where = ["--org", ORG, "--url", server.url, "--token", TOKEN]
    done = tuneyard(tmp_path, "secret", "add", "n", *arguments, *where, typed=typed, **env)
    assert done.stdout == "made\n", done.stderr
    assert json.loads(server.requests[-1][2]) == {"org": ORG, "name": "n", "type": type_, "data": data}


def test_a_secret_typed_on_a_terminal_is_not_shown_there(tmp_path: Path, server: Server) -> None:
    server.answers = [Answer(200, {"secret_id": "made"})]
    command = [sys.executable, "-m", "serve_app.cli", "secret", "add", "n", "--type", "hf"]
    command += ["--org", ORG, "--url", server.url, "--token", TOKEN]
    env = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"} | {"TUNEYARD_HOME": str(tmp_path)}
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, command, env)
    shown = b""
    while b"HF_TOKEN is not set" not in shown:
        shown += os.read(terminal, 1024)
    os.write(terminal, b"hf_typed\n")
    with contextlib.suppress(OSError):  # which is how Linux says that the other end is closed
        while block := os.read(terminal, 1024):
            shown += block
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert b"made" in shown
    assert b"hf_typed" not in shown
    assert json.loads(server.requests[-1][2])["data"] == {"token": "hf_typed"}


def test_secret_add_reads_a_service_accounts_key_from_its_file(tmp_path: Path, server: Server) -> None:
    server.answers = [Answer(200, {"secret_id": "made"})]
    key = tmp_path / "key.json"
    key.write_text('{"type": "service_account"}')
    add = ["secret", "add", "n", "--type", "gcs", "--org", ORG, "--url", server.url, "--token", TOKEN]
    for arguments, env in ((["--key-file", str(key)], {}), ([], {"GOOGLE_APPLICATION_CREDENTIALS": str(key)})):
        assert tuneyard(tmp_path, *add, *arguments, **env).returncode == 0
        assert json.loads(server.requests[-1][2])["data"] == {"service_account_json": key.read_text()}
    missing = tuneyard(tmp_path, *add, "--key-file", str(tmp_path / "none"))
    assert (missing.returncode, "can't be read" in missing.stderr) == (2, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--type", "hf", "--role-arn", ROLE],
        ["--type", "aws", "--endpoint-url", "http://a"],
        ["--type", "hf", "--key-file", "key.json"],
        ["--type", "gcs", "--region", "us-west-2"],
        ["--type", "gcs"],
        ["--type", "ftp"],
    ],
)
def test_secret_add_refuses_what_does_not_go_together(tmp_path: Path, arguments: list[str]) -> None:
    done = tuneyard(
        tmp_path, "secret", "add", "n", *arguments, "--org", ORG, "--url", "http://127.0.0.1:9", "--token", TOKEN, **KEYS
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


WEBHOOK = {
    "webhook_id": "w",
    "url": "https://h.example/\x1b[2J",
    "events": ["job.failed"],
    "created_at": "2026-01-02T03:04:05.678Z",
}


def test_webhooks_are_added_listed_tested_and_deleted(tmp_path: Path, server: Server) -> None:
    where = ["--org", ORG, "--url", server.url, "--token", TOKEN]

    def ask(answer: Any, *arguments: str) -> subprocess.CompletedProcess[str]:
        server.answers = [Answer(200, answer)]
        return tuneyard(tmp_path, "webhook", *arguments, *where)

    made = ask(WEBHOOK | {"secret": "whsec_x"}, "add", "https://h.example/", "--event", "job.failed")
    assert made.stdout == "w\nwhsec_x\n", made.stderr
    assert json.loads(server.requests[-1][2]) == {"org": ORG, "url": "https://h.example/", "events": ["job.failed"]}
    ask(WEBHOOK | {"secret": "whsec_x"}, "add", "https://h.example/")
    assert json.loads(server.requests[-1][2]) == {"org": ORG, "url": "https://h.example/"}
    listed = ask({"webhooks": [WEBHOOK]}, "list").stdout
    assert listed.startswith("w  https://h.example/")
    assert "\x1b" not in listed
    tests = "POST /webhook/w/test?org_id=" + ORG
    for error, code in ((None, 0), ("it answered with status 404", 1)):
        done = ask({"webhook_id": "w", "delivered": error is None, "error": error}, "test", "w")
        assert (done.returncode, server.requests[-1][0]) == (code, tests)
        assert (error or "delivered") in done.stdout + done.stderr
    assert "deleted" in ask({"webhook_id": "w", "deleted": True}, "delete", "w").stdout
    assert server.requests[-1][0] == "DELETE /webhook/w?org_id=" + ORG


def test_every_operation_has_a_call_and_every_call_a_command() -> None:
    """But for the probes, and what is a job's own path besides its query."""
    from serve_app.client import api
    from serve_app.routes import jobs, journal, secrets, webhooks

    calls = {}
    for name, call in inspect.getmembers(api, inspect.isfunction):
        if call.__annotations__.get("return", "").startswith("Call["):
            made = call(*["{id}" if p.endswith("_id") else {} for p in inspect.signature(call).parameters if _is_needed(call, p)])
            calls[name] = (made.method, made.path)
    operations = {
        (method, re.sub(r"{\w+}", "{id}", route.path))
        for room in (jobs, journal, secrets, webhooks)
        for route in room.router.routes
        if route.include_in_schema and not route.path.startswith("/job/{")
        for method in route.methods
    }
    assert {(method, unquote(path)) for method, path in calls.values()} == operations
    assert calls.keys() <= public(Client)
    commands = "".join(path.read_text() for path in (Path(cli.__file__).parent).glob("*.py"))
    assert [name for name in calls if f".{name}(" not in commands] == []


def _is_needed(call: Any, parameter: str) -> bool:
    return inspect.signature(call).parameters[parameter].default is inspect.Parameter.empty


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def test_both_clients_have_the_same_calls() -> None:
    assert public(Client) == public(AsyncClient)


def test_the_async_client_asks_the_same(server: Server) -> None:
    server.answers = [Answer(200, {"status": "QUEUED"})]

    async def ask() -> None:
        async with AsyncClient(server.url, TOKEN) as client:
            await client.submit(DOCUMENTED)
            await client.metrics(JOB, ORG, after_step=3)
            assert [job async for job in client.watch(JOB, ORG)][-1]["status"] == "COMPLETED"

    server.answers += [Answer(200, {"points": []}), Answer(200, {"status": "RUNNING"}), Answer(200, {"status": "COMPLETED"})]
    asyncio.run(ask())
    Client(server.url, TOKEN).submit(DOCUMENTED)
    first, second = server.requests[0], server.requests[-1]
    assert (first[0], first[1]["Authorization"]) == (second[0], second[1]["Authorization"])
    assert "after_step=3" in server.requests[1][0]


def test_the_async_client_tries_again_under_one_key_and_sends_no_secret_twice(server: Server) -> None:
    away = Answer(503, {"detail": "away"}, {"Retry-After": "0"})

    async def ask() -> None:
        async with AsyncClient(server.url, TOKEN) as client:
            server.answers = [away, Answer(200, {"request_id": JOB})]
            assert (await client.submit(DOCUMENTED))["request_id"] == JOB
            server.answers = [away]
            with pytest.raises(ApiError, match="away"):
                await client.create_secret(ORG, "n", "hf", {"token": "t"})

    asyncio.run(ask())
    submitted = [headers for line, headers, _ in server.requests if line == "POST /job/"]
    assert (len(submitted), len({h["Idempotency-Key"] for h in submitted})) == (2, 1)
    assert len(server.requests) == 3


def sse(*entries: dict[str, Any], end: bool) -> Answer:
    text = "".join(f"id: {e['id']}\nevent: events\ndata: {json.dumps(e)}\n\n" for e in entries)
    return Answer(200, f"retry: 1\n\n: still here\n\n{text}" + ("event: end\ndata: {}\n\n" if end else ""))


def test_a_followed_stream_that_breaks_is_taken_up_where_it_was(server: Server) -> None:
    server.answers = [sse({"id": 4}, {"id": 7}, end=False), sse({"id": 9}, end=True)]
    assert [e["id"] for e in Client(server.url, TOKEN).follow_events(JOB, ORG)] == [4, 7, 9]
    assert [headers.get("Last-Event-ID") for _, headers, _ in server.requests] == [None, "7"]
    server.answers = [Answer(404, {"detail": "no job"})]
    with pytest.raises(ApiError, match="no job"):
        list(Client(server.url, TOKEN).follow_events(JOB, ORG))


def test_downloads_are_checked_and_stay_in_their_folder(server: Server, tmp_path: Path) -> None:
    def download(name: str, sha256: str | None) -> list[Path]:
        file = {"name": name, "uri": f"s3://b/{name}", "size_bytes": 4, "sha256": sha256, "url": f"{server.url}/link"}
        server.answers = [Answer(200, {"files": [file]}), Answer(200, "data")]
        return Client(server.url, TOKEN).download(JOB, ORG, tmp_path / "to")

    (tmp_path / "to").mkdir()
    right = hashlib.sha256(b"data").hexdigest()
    assert [p.read_text() for p in download("adapter/weights", right)] == ["data"]
    assert "Authorization" not in server.requests[-1][1]
    with pytest.raises(ValueError, match="damaged"):
        download("adapter/other", "0" * 64)
    with pytest.raises(ValueError, match="outside"):
        download("../escaped", right)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["weights"]


def test_a_download_without_the_adapter_says_so(server: Server, tmp_path: Path) -> None:
    def said(name: str) -> str:
        file = {"name": name, "uri": f"s3://b/{name}", "size_bytes": 4, "sha256": None, "url": f"{server.url}/link"}
        server.answers = [Answer(200, {"files": [file]}), Answer(200, "data")]
        target = ("download", JOB, str(tmp_path / "to"), "--org", ORG, "--url", server.url, "--token", TOKEN)
        done = tuneyard(tmp_path, *target)
        assert (done.returncode, done.stdout) == (0, f"1 files in {tmp_path / 'to'}\n"), done.stderr
        return done.stderr

    assert said("adapter/adapter_model.safetensors") == ""
    assert said("metrics.jsonl") == "no adapter is among them: a job has one once it is COMPLETED\n"


def test_reading_commands_print_what_the_service_says(server: Server, tmp_path: Path) -> None:
    def said(answer: dict[str, Any], *arguments: str) -> str:
        server.answers = [Answer(200, answer)]
        done = tuneyard(tmp_path, *arguments, "--org", ORG, "--url", server.url, "--token", TOKEN)
        assert done.returncode == 0, done.stderr
        return done.stdout

    points = {"points": [{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.25, "eval_loss": 2.0}]}
    assert "loss 1.25" in said(points, "metrics", JOB)
    assert json.loads(said(points, "metrics", JOB, "--json")) == points
    line = {"id": 1, "time": "2026-01-01T00:00:00.000Z", "attempt": 1, "rank": 3, "line": "step 1"}
    assert said({"logs": [line]}, "logs", JOB) == "2026-01-01T00:00:00  [3] step 1\n"
    assert "queued again" in said({"status": "QUEUED", "message": "queued again"}, "resume", JOB)


def test_whoami_shows_the_token_s_claims_and_never_the_token(tmp_path: Path) -> None:
    import jwt

    token = jwt.encode({"sub": "ann", "org": ORG, "exp": 4_000_000_000}, "k" * 32, "HS256")
    done = tuneyard(tmp_path, "whoami", "--token", token, "--json")
    said = json.loads(done.stdout)
    assert (said["subject"], said["orgs"], said["expired"], said["expires_at"]) == ("ann", [ORG], False, "2096-10-02T07:06:40Z")
    assert token not in done.stdout + done.stderr
    assert tuneyard(tmp_path, "whoami", "--token", "x.y").returncode == 1


def test_a_service_that_is_away_is_exit_code_3(tmp_path: Path) -> None:
    done = tuneyard(tmp_path, "cancel", JOB, "--org", ORG, "--url", "http://127.0.0.1:1", "--token", TOKEN)
    assert done.returncode == 3
    assert "can't be reached" in done.stderr


def test_the_store_is_upgraded_by_a_command(tmp_path: Path) -> None:
    from serve_app.store.jobs import JobStore

    assert tuneyard(tmp_path, "db", "upgrade").returncode == 0
    JobStore.open(f"sqlite:///{tmp_path}/tuneyard.db").require_current()
