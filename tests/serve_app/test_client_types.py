"""What a type checker, and with it an editor, knows of the clients' answers; and that a client pays nothing for it."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import serve_app.client
from serve_app.client import AsyncClient, Client

ROOT = Path(__file__).parent.parent.parent
ANSWERS = {
    "submit({})": "Submitted",
    "plan({})": "Plan",
    "get('', '')": "JobAnswer",
    "list_jobs('')": "JobList",
    "cancel('', '')": "JobAnswer",
    "resume('', '')": "JobAnswer",
    "metrics('', '')": "Points",
    "events('', '')": "Events",
    "logs('', '')": "Logs",
    "artifacts('', '')": "Artifacts",
    "create_secret('', '', '', {})": "SecretAnswer",
    "list_secrets('')": "Secrets",
    "delete_secret('', '')": "Deleted",
    "create_webhook('', '')": "NewWebhook",
    "list_webhooks('')": "WebhookList",
    "test_webhook('', '')": "TestedWebhook",
    "delete_webhook('', '')": "DeletedWebhook",
}
ENTRIES = {
    "follow_events('', '')": "EventEntry",
    "follow_logs('', '')": "LogEntry",
    "iter_jobs('')": "JobAnswer",
    "watch('', '')": "JobAnswer",
}


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """What mypy says of some code: (line, sentence) each."""
    folder = tmp_path_factory.mktemp("mypy")

    def check(code: str) -> list[tuple[int, str]]:
        (folder / "snippet.py").write_text(code)
        command = [sys.executable, "-m", "mypy", "--cache-dir", folder / "cache", "--no-error-summary", folder / "snippet.py"]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert said.stderr == ""
        return [(int(line), sentence) for line, sentence in re.findall(r"snippet\.py:(\d+): (.*)$", said.stdout, re.M)]

    return check


def test_every_answer_of_both_clients_has_its_own_type(checked):
    types = [*ANSWERS.values()] + [f"Iterator[{entry}]" for entry in ENTRIES.values()]
    types += [*ANSWERS.values()] + [f"AsyncIterator[{entry}]" for entry in ENTRIES.values()]
    calls = [f"blocking.{call}" for call in [*ANSWERS, *ENTRIES]]
    calls += [f"await awaited.{call}" for call in ANSWERS] + [f"awaited.{call}" for call in ENTRIES]
    code = "from serve_app.client import AsyncClient, Client\nasync def f(blocking: Client, awaited: AsyncClient) -> None:\n"
    said = checked(code + "\n".join(f"    reveal_type({call})" for call in calls))
    assert [re.sub(r"TypedDict\(serve_app\.routes\.answers\.(\w+), .*\}\)", r"\1", sentence) for _, sentence in said] == [
        f'note: Revealed type is "{"typing." * ("[" in name)}{name}"' for name in types
    ]


def test_a_mistake_in_a_field_is_an_error(checked):
    code = """from serve_app.client import Client, JobAnswer, NoSuchAnswer
def f(client: Client) -> None:
    job: JobAnswer = client.get("", "")
    print(job["statsu"])
    client.metrics("", "")["points"][0]["step"].upper()
    print((job["total_steps"] or 0) + job["step"])
    for job in client.watch("", ""):
        print(job["status"] == "COMPLETED")
"""
    assert [line for line, sentence in checked(code) if sentence.startswith("error:")] == [1, 4, 5]


def test_no_call_of_the_clients_is_left_out_here():
    for client in (Client, AsyncClient):
        calls = {name for name, _ in inspect.getmembers(client, inspect.isfunction) if not name.startswith("_")}
        assert calls == {call.partition("(")[0] for call in [*ANSWERS, *ENTRIES]} | {"close", "download"}


def test_both_clients_have_the_same_parameters():
    for call in [*ANSWERS, *ENTRIES]:
        name = call.partition("(")[0]
        one, other = inspect.signature(getattr(Client, name)), inspect.signature(getattr(AsyncClient, name))
        assert one.parameters == other.parameters, name


def test_a_client_loads_nothing_of_the_service_until_a_type_is_named():
    heavy = ("pydantic", "fastapi", "ray", "torch", "sqlalchemy", "serve_app.routes")
    code = f"""import sys, serve_app.client
print([m for m in {heavy} if m in sys.modules])
from serve_app.client import JobAnswer
print(JobAnswer.__name__)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\nJobAnswer\n"


def test_every_exported_name_is_there_and_no_other():
    assert {name for name in serve_app.client.__all__ if not hasattr(serve_app.client, name)} == set()
    with pytest.raises(ImportError):
        from serve_app.client import NoSuchAnswer  # noqa: F401
